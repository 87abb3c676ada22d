# Sourced by the scripts beside it, before anything is installed.

# usage: the comment at the head of the running script
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$0"; }

# help_if_asked ARGUMENT...: print the usage and exit if an argument asks for it
help_if_asked() {
    local word
    for word; do case $word in -h | --help) usage && exit ;; esac; done
}
