# Sourced by torchrun and mpirun beside it: --help, --ranks and --hostfile, and the environment that travels to other hosts.

usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

ranks='' hostfile=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --ranks) ranks=${2:-} && shift 2 || { usage >&2 && exit 2; } ;;
    --hostfile) hostfile=${2:-} && shift 2 || { usage >&2 && exit 2; } ;;
    -*) echo "unknown option $1" >&2 && usage >&2 && exit 2 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2 && exit 2; }

here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$here"
case $ranks in *[!0-9]* | 0) die "expected --ranks to be a positive number, got $ranks" ;; esac
[ -z "$hostfile" ] || [ -r "$hostfile" ] || die "expected --hostfile to be a file that can be read, got $hostfile"
mapfile -t settings < <(env | grep -E '^(PATH|PYTHONPATH|OMP_NUM_THREADS|(GLOO|NCCL|TORCH|UCX|FI)_[A-Z_]*)=')
