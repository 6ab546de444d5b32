#!/usr/bin/env bash
# Deploys sd-server to SageMaker, or updates an existing deployment.
set -euo pipefail
shopt -s inherit_errexit
export LC_ALL=C

usage() {
    cat <<'END'
usage: deploy.sh --image IMAGE [options] [PARAMETER=VALUE ...]

  --image IMAGE     a local image, which is pushed, or the URI of one in the deployment's repository
  --model PATH      model.tar.gz, or a directory in Diffusers format; default: weights in the image
  --name NAME       name of the deployment; default: sd
  --async           also the asynchronous endpoint, which costs nothing while idle
  --no-realtime     without the real-time endpoint
  --front           also the public web page
  PARAMETER=VALUE   parameter of any template, for example InstanceType=ml.g4dn.xlarge

The region and the credentials are those of the aws command line.
END
}

fail() {
    echo "deploy.sh: $1" >&2
    exit 64
}

here=$(cd "$(dirname "$0")" && pwd)
name=sd image='' model='' realtime=true async=false front=false
settings=()
while (($#)); do
    case $1 in
        --image | --model | --name)
            [[ $# -ge 2 ]] || fail "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --async) async=true ;;
        --no-realtime) realtime=false ;;
        --front) front=true ;;
        -h | --help) usage && exit ;;
        *=*) settings+=("$1") ;;
        *) usage >&2 && fail "unknown argument $1" ;;
    esac
    shift
done
[[ $image ]] || { usage >&2 && fail "--image is required"; }
[[ -z $model || -e $model ]] || fail "$model does not exist"
[[ $realtime == true || $async == true ]] || fail "--no-realtime requires --async"

# knows TEMPLATE PARAMETER: whether the template has it.
knows() {
    grep -Eq "^  $2:\$" <(sed '/^Conditions:\|^Resources:/,$d' "$here/$1.yaml")
}

for setting in "${settings[@]}"; do
    known=false
    for template in storage realtime async front watch; do
        if knows "$template" "${setting%%=*}"; then known=true; fi
    done
    [[ $known == true ]] || fail "no template has the parameter ${setting%%=*}"
done

# stack TEMPLATE [PARAMETER=VALUE ...]: deploys one stack with the settings that its template has.
stack() {
    local template=$1 parameters=("Name=$name" "${@:2}")
    for setting in "${settings[@]}"; do
        if knows "$template" "${setting%%=*}"; then parameters+=("$setting"); fi
    done
    echo "stack $name-$template" >&2
    aws cloudformation deploy --stack-name "$name-$template" \
        --template-file "$here/$template.yaml" --capabilities CAPABILITY_IAM \
        --tags "sd-server=$name" --no-fail-on-empty-changeset \
        --parameter-overrides "${parameters[@]}" >&2
}

# exists TEMPLATE: whether the stack exists. Any other error than its absence ends the script.
exists() {
    local error
    if error=$(aws cloudformation describe-stacks --stack-name "$name-$1" 2>&1 >/dev/null); then
        return 0
    fi
    [[ $error == *'does not exist'* ]] || { echo "$error" >&2 && exit 1; }
    return 1
}

# output TEMPLATE KEY: an output of a stack.
output() {
    aws cloudformation describe-stacks --stack-name "$name-$1" --output text \
        --query "Stacks[0].Outputs[?OutputKey=='$2'].OutputValue"
}

# push: pushes the local image to the repository and prints its URI. The tag is its content hash.
push() {
    local id target
    id=$(docker image inspect --format '{{.Id}}' "$image")
    id=${id#sha256:}
    target=$repository:${id:0:16}
    if ! aws ecr describe-images --repository-name "${repository#*/}" \
        --image-ids "imageTag=${id:0:16}" >/dev/null 2>&1; then
        aws ecr get-login-password |
            docker login --username AWS --password-stdin "${repository%%/*}" >&2
        docker tag "$image" "$target"
        docker push "$target" >&2
    fi
    echo "$target"
}

# upload: uploads the model to the bucket under its content hash and prints its parameters. One of
# them is empty, since an update must clear the other.
upload() {
    local hash target
    if [[ -d $model ]]; then
        hash=$(cd "$model" && find -L . -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum)
        target=s3://$bucket/models/${hash:0:16}/
        aws s3 sync --only-show-errors "$model" "$target" >&2
        printf '%s\n' ModelTarball= "ModelPrefix=$target"
    else
        hash=$(sha256sum "$model")
        target=s3://$bucket/models/${hash:0:16}.tar.gz
        aws s3 ls "$target" >/dev/null ||
            aws s3 cp --only-show-errors "$model" "$target" >&2
        printf '%s\n' "ModelTarball=$target" ModelPrefix=
    fi
}

# code: uploads the front's function to the bucket and prints its key.
code() {
    local hash key scratch
    hash=$(sha256sum "$here/front/index.py")
    key=front/${hash:0:16}.zip
    scratch=$(mktemp -d)
    (cd "$here/front" && python3 -m zipfile -c "$scratch/code.zip" index.py)
    aws s3 cp --only-show-errors "$scratch/code.zip" "s3://$bucket/$key" >&2
    rm -r "$scratch"
    echo "$key"
}

stack storage
bucket=$(output storage Bucket)
repository=$(output storage Repository)
[[ $image == "$repository"[:@]* ]] || image=$(push)
endpoint=("Image=$image")
if [[ $model ]]; then
    uploaded=$(upload)
    mapfile -t -O 1 endpoint <<<"$uploaded"
fi
if [[ $realtime == true ]]; then stack realtime "${endpoint[@]}"; fi
if [[ $async == true ]]; then stack async "${endpoint[@]}"; fi
# Stacks of an earlier run still exist.
if exists realtime; then realtime=true; fi
if exists async; then async=true; fi
stack watch "Realtime=$realtime" "Async=$async"
echo "dashboard: $(output watch Dashboard)"
if [[ $front == true ]]; then
    key=$(code)
    stack front "CodeKey=$key" "Realtime=$realtime" "Async=$async"
    echo "page: $(output front Url)"
fi
echo "generate an image: $here/invoke.py --name $name 'a lighthouse at night'"
