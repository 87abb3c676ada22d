# Sourced by the scripts beside it that start commands on other hosts.

# quoted WORD...: the words as any POSIX shell reads them back, whatever they hold (printf %q is for bash alone)
quoted() {
    local word escaped="'\\''"
    for word; do printf "'%s' " "${word//\'/"$escaped"}"; done
}
