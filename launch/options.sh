# Sourced by torchrun and mpirun beside it: --help, --ranks and --hostfile, checked before anything is installed; then what
# is missing is installed, and the environment chosen that travels to other hosts.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"
source "$(dirname "${BASH_SOURCE[0]}")/usage.sh"

refuse() { echo "$*" >&2; exit 2; }

ranks='' hostfile=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --ranks | --hostfile)
        [ $# -ge 2 ] || refuse "expected a value after $1, got none"
        [ "$1" = --ranks ] && ranks=$2 || hostfile=$2
        [[ $1 != --ranks || $2 =~ ^[1-9][0-9]*$ ]] || refuse "expected --ranks to be a positive number, got $2"
        [[ $1 != --hostfile || (-r $2 && ! -d $2) ]] || refuse "expected --hostfile to be a file that can be read, got $2"
        shift 2
        ;;
    -*) echo "unknown option $1" >&2 && usage >&2 && exit 2 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || { usage >&2 && exit 2; }

# read_hosts: of the hostfile, `lines` without comments, tabs and carriage returns, the `hosts` in them and their `slots`,
# a number or nothing
hosts=() slots=() lines=()
read_hosts() {
    local LC_ALL=C line number=0 host
    local form='^ *([^ ]+)( +slots *= *([1-9][0-9]*))?( +max[-_]slots *= *[1-9][0-9]*)? *$'
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        line=${line%%#*}
        line=${line//[$'\t\r']/ }
        [[ $line =~ [^\ ] ]] || continue
        [[ $line =~ $form ]] || refuse "expected lines like 'node1 slots=2', got line $number of $hostfile: ${line@Q}"
        host=${BASH_REMATCH[1]}
        case $host in # "-" would be an option of ssh's
        -* | *@-* | *[!][:alnum:]@._:%[-]*) refuse "expected a host's name or address, got ${host@Q} in line $number of $hostfile" ;;
        esac
        [[ " ${hosts[*]} " != *" $host "* ]] ||
            refuse "expected one line for each host, got another for $host, line $number of $hostfile: write slots=N"
        hosts+=("$host") slots+=("${BASH_REMATCH[3]}") lines+=("$line")
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || refuse "expected a host in a line of its own, got none in $hostfile"
}
[ -z "$hostfile" ] || read_hosts

here=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$here"
settings=() # NAME=VALUE, whatever the value holds
for name in $(compgen -e); do
    [[ ! $name =~ ^(PATH|PYTHONPATH|OMP_NUM_THREADS|(GLOO|NCCL|TORCH|UCX|FI)_[A-Z0-9_]*)$ ]] || settings+=("$name=${!name}")
done
