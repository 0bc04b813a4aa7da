# Shared by the launch scripts, which source it: options, --dry-run, retries.
#
# Environment: TRIES (5) attempts of a command that may fail for reasons that pass, with PAUSE (10) seconds before the
# second, twice as many before the third, and so on.

exec 3>&1 # where --dry-run prints, also from $(...)
PROGRAM=${0##*/}
TRIES=${TRIES:-5} PAUSE=${PAUSE:-10}
dry_run='' words=() flags=() env=()

die() { # one sentence, status 2
    echo "$PROGRAM: $*" >&2
    exit 2
}

say() { echo "$PROGRAM: $*" >&2; }

# parse "NAME= FLAG ..." ARGUMENTS: --name=value and --flag set the variables $name and $flag (to 1), - becomes _ in them;
# --env=NAME=VALUE, which may be given again, adds to $env; what follows -- is in $flags, and other words in $words.
parse() {
    local known=" $1 env= dry-run " key
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift && flags=("$@") && return ;;
            --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#SBATCH/ { sub(/^# ?/, ""); print }' "$0" && exit 0 ;;
            --env=?*=*) env+=("${1#--env=}") ;;
            --*=*)
                key=${1%%=*} && key=${key#--}
                [[ $known == *" $key= "* ]] || die "unknown option --$key: --help lists them, the program's go after --"
                printf -v "${key//-/_}" %s "${1#*=}"
                ;;
            --*)
                key=${1#--}
                [[ $known != *" $key= "* ]] || die "--$key needs a value: --$key=VALUE"
                [[ $known == *" $key "* ]] || die "unknown option --$key: --help lists them, the program's go after --"
                printf -v "${key//-/_}" 1
                ;;
            *) words+=("$1") ;;
        esac
        shift
    done
}

need() { # NAME ...: options that must have been given
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || die "--${name//_/-} is missing: --help says what it is"
    done
}

need_flags() {
    [ ${#flags[@]} -gt 0 ] || die "the program's own options are missing: give them after --, such as -- --config=configs/ccd_sr.py"
}

number() { # NAME ...: options that must be whole numbers
    local name
    for name in "$@"; do
        [[ ${!name} =~ ^[0-9]+$ ]] || die "--${name//_/-}=${!name} is no whole number: give one, such as --${name//_/-}=2"
    done
}

quoted() { # the words, so that a shell reads them back
    local line
    line=$(printf '%q ' "$@")
    printf '%s' "${line% }"
}

run() { # a command; with --dry-run it is printed instead
    if [ -n "$dry_run" ]; then
        quoted "$@" >&3
        echo >&3
    else
        "$@"
    fi
}

retry() { # a command, again if it fails; the last attempt's status
    local try=1 pause=$PAUSE status
    while :; do
        status=0
        run "$@" || status=$?
        [ "$status" != 0 ] && [ "$try" -lt "$TRIES" ] || return "$status"
        say "$1 failed with status $status: attempt $((++try)) of $TRIES in $pause s"
        sleep "$pause"
        pause=$((2 * pause))
    done
}

settings() { # GENERATION or gpu: adds the environment of flags.sh to $env, before what --env gave, which counts
    local line given=("${env[@]+"${env[@]}"}")
    env=()
    while IFS= read -r line; do env+=("$line"); done < <(environment "$1")
    env+=("${given[@]+"${given[@]}"}")
}
