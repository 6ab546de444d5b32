//! What an error says of the device.

use candle_core::Error;
use candle_core::cuda::CudaError;
use candle_core::cuda_backend::cudarc::cublas::result::CublasError;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasStatus_t as Cublas;
use candle_core::cuda_backend::cudarc::driver::DriverError;
use candle_core::cuda_backend::cudarc::driver::sys::CUresult as Code;

use crate::ops::types::DeviceFault;

/// `None` if the error says nothing of the device.
pub(crate) fn device_fault(error: &Error) -> Option<DeviceFault> {
    match error {
        Error::WithBacktrace { inner, .. }
        | Error::WithPath { inner, .. }
        | Error::Context { inner, .. } => device_fault(inner),
        Error::WrappedContext { wrapped, .. } => device_fault(wrapped.downcast_ref()?),
        Error::Cuda(cuda) => match cuda.downcast_ref() {
            Some(CudaError::Cuda(error) | CudaError::Load { cuda: error, .. }) => of_driver(*error),
            Some(CudaError::Cublas(error)) => of_cublas(*error),
            _ => cuda.downcast_ref().and_then(|error| of_driver(*error)),
        },
        _ => None,
    }
}

/// Every error of the driver is that of a lost context, but for those of a call that was refused.
fn of_driver(DriverError(code): DriverError) -> Option<DeviceFault> {
    match code {
        Code::CUDA_ERROR_OUT_OF_MEMORY => Some(DeviceFault::OutOfMemory),
        Code::CUDA_ERROR_INVALID_VALUE
        | Code::CUDA_ERROR_NO_DEVICE
        | Code::CUDA_ERROR_INVALID_DEVICE
        | Code::CUDA_ERROR_INVALID_IMAGE
        | Code::CUDA_ERROR_NO_BINARY_FOR_GPU
        | Code::CUDA_ERROR_INVALID_PTX
        | Code::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
        | Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | Code::CUDA_ERROR_JIT_COMPILATION_DISABLED
        | Code::CUDA_ERROR_INVALID_SOURCE
        | Code::CUDA_ERROR_NOT_FOUND
        | Code::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        | Code::CUDA_ERROR_NOT_SUPPORTED
        | Code::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | Code::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => None,
        _ => Some(DeviceFault::Lost),
    }
}

fn of_cublas(CublasError(status): CublasError) -> Option<DeviceFault> {
    match status {
        Cublas::CUBLAS_STATUS_ALLOC_FAILED => Some(DeviceFault::OutOfMemory),
        Cublas::CUBLAS_STATUS_EXECUTION_FAILED
        | Cublas::CUBLAS_STATUS_INTERNAL_ERROR
        | Cublas::CUBLAS_STATUS_MAPPING_ERROR => Some(DeviceFault::Lost),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_stay_mean_that_the_device_is_lost() {
        let fault = |code| device_fault(&Error::from(CudaError::Cuda(DriverError(code))));
        for code in [
            Code::CUDA_ERROR_ILLEGAL_ADDRESS,
            Code::CUDA_ERROR_MISALIGNED_ADDRESS,
            Code::CUDA_ERROR_ILLEGAL_INSTRUCTION,
            Code::CUDA_ERROR_INVALID_PC,
            Code::CUDA_ERROR_INVALID_ADDRESS_SPACE,
            Code::CUDA_ERROR_HARDWARE_STACK_ERROR,
            Code::CUDA_ERROR_LAUNCH_TIMEOUT,
            Code::CUDA_ERROR_LAUNCH_FAILED,
            Code::CUDA_ERROR_ASSERT,
            Code::CUDA_ERROR_ECC_UNCORRECTABLE,
            Code::CUDA_ERROR_NVLINK_UNCORRECTABLE,
            Code::CUDA_ERROR_CONTAINED,
            Code::CUDA_ERROR_CONTEXT_IS_DESTROYED,
            Code::CUDA_ERROR_DEVICE_UNAVAILABLE,
            Code::CUDA_ERROR_MPS_CLIENT_TERMINATED,
            Code::CUDA_ERROR_UNKNOWN,
        ] {
            assert_eq!(fault(code), Some(DeviceFault::Lost), "{code:?}");
        }
        assert_eq!(fault(Code::CUDA_ERROR_OUT_OF_MEMORY), Some(DeviceFault::OutOfMemory));
        for code in [
            Code::CUDA_ERROR_INVALID_VALUE,
            Code::CUDA_ERROR_NOT_FOUND,
            Code::CUDA_ERROR_NO_BINARY_FOR_GPU,
            Code::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
        ] {
            assert_eq!(fault(code), None, "{code:?}");
        }
    }

    #[test]
    fn an_error_is_found_within_others() {
        let lost = || DriverError(Code::CUDA_ERROR_ILLEGAL_ADDRESS);
        for error in [
            Error::Cuda(Box::new(lost())),
            Error::from(CudaError::Load { cuda: lost(), module_name: "fill".into() }),
            Error::from(CudaError::Cuda(lost())).context("while drawing").with_path("weights"),
            Error::from(CudaError::Cublas(CublasError(Cublas::CUBLAS_STATUS_EXECUTION_FAILED))),
        ] {
            assert_eq!(device_fault(&error), Some(DeviceFault::Lost), "{error}");
        }
        assert_eq!(device_fault(&Error::Msg("CUDA_ERROR_UNKNOWN".into())), None);
    }
}
