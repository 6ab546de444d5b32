# To be sourced: the variables with which a program is built for CUDA and runs on the emulator.
emulator=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export EMUCUDA_OUT=${EMUCUDA_OUT:-$emulator/lib}
export CUDA_HOME=${CUDA_HOME:?must be a CUDA toolkit, as toolkit.sh makes one}
export CUDA_ROOT=$CUDA_HOME CUDA_PATH=$CUDA_HOME CUDA_TOOLKIT_ROOT_DIR=$CUDA_HOME
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}
export PATH=$CUDA_HOME/bin:$PATH
export LIBRARY_PATH=$EMUCUDA_OUT/link${LIBRARY_PATH:+:$LIBRARY_PATH}
export LD_LIBRARY_PATH=$EMUCUDA_OUT${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
