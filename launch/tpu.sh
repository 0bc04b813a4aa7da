#!/usr/bin/env bash
# Cloud TPUs: get a slice, put the program on it, run it, watch it, give it back.
#
#   launch/tpu.sh babysit sr us-east5-a --type=v6e-64 --spot -- --config=configs/ccd_sr.py:sd21 --workdir=/mnt/mine/sr
#
# launch/tpu.sh ACTION NAME ZONE [OPTIONS] [-- the program's options]
#   create   request the slice, wait until it is there; again if that fails. With --startup its machines install and run
#            the program by themselves, also after they were restarted, without this computer
#   setup    copy this checkout's last commit to every worker and install it in ~/cddistill/.venv
#   run      start the program on every worker; it goes on when this computer is off, and starts again when a signal
#            ended it (status 128 and more: preempted, or JAX lost another host)
#   status   the state of the request, and of the program on each worker: running, stopped or its exit status
#   logs     the last lines of --worker's log, and those that follow
#   babysit  create, setup and run, again whenever the slice is lost or the program stops; ends when the program has ended
#   delete   give the slice back
#
# --type=v6e-64       type of the accelerator (create, run, babysit)
# --slices=2          several slices as one run (multislice): NAME-0, NAME-1, ...
# --spot, --reserved  capacity; without one of them on demand
# --direct            a TPU VM at once instead of a queued resource
# --project=P         else gcloud's default
# --image=I           runtime image, else that of the generation (flags.sh)
# --startup=gs://B/F  create: where to put the code for the machines to fetch
# --restarts=20       babysit, run: so often at most
# --worker=0          logs: which one
# --env=NAME=VALUE    for the program; again for several
# --dry-run           print every command, and run none
#
# Environment: POLL (60) seconds between two looks at a state; LIBTPU_INIT_ARGS instead of those in flags.sh; TRIES and PAUSE
# as in common.sh.
# Status: 2 for a mistake in the options, 1 if the slice cannot be had, babysit that of the program.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
source "$HERE/common.sh"
source "$HERE/flags.sh"

slices=1 restarts=20 worker=0 type='' spot='' reserved='' direct='' project='' image='' startup=''
parse "type= slices= spot reserved direct project= image= startup= restarts= worker=" "$@"
[ ${#words[@]} -eq 3 ] || die "give ACTION, NAME and ZONE, such as: create sr us-east5-a --type=v6e-64"
action=${words[0]} name=${words[1]} zone=${words[2]} POLL=${POLL:-60}
number slices restarts worker
gen='' && [ -z "$type" ] || gen=$(generation "$type")
[ -z "$direct" ] || [ "$slices" = 1 ] || die "--direct gives one slice: leave out --slices=$slices, or --direct"
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved exclude each other: leave one out"
place=("--zone=$zone") && [ -z "$project" ] || place+=("--project=$project")
nodes=("$name")
if [ "$slices" -gt 1 ]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi
api=(gcloud compute tpus queued-resources) && [ -z "$direct" ] || api=(gcloud compute tpus tpu-vm)

# ---- what the workers do

INSTALL='mkdir -p ~/cddistill && tar xzf ~/cddistill.tar.gz -C ~/cddistill && cd ~/cddistill &&
python3 -m pip install --quiet --user uv && { [ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv; } &&
python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e ".[tpu]"'

job() { # the program on a worker: ~/cddistill.log has what it prints, ~/cddistill.status how it ended
    settings "$gen"
    cat << EOF
cd ~/cddistill && exec 9> ~/cddistill.lock >> ~/cddistill.log 2>&1 < /dev/null
flock -n 9 || exit 1
rm -f ~/cddistill.status
export CDDISTILL_COORDINATOR=auto $(quoted "${env[@]}")
left=$restarts
while :; do
    .venv/bin/python -m cddistill.main $(quoted "${flags[@]}") 9>&- && status=0 || status=\$?
    [ \$status -ge 128 ] && [ \$((left--)) -gt 0 ] || break
    echo "status \$status: starting again"
done
echo \$status > ~/cddistill.status
EOF
}

LOOK='cat ~/cddistill.status 2> /dev/null || { pgrep -f "cddistill[.]main" > /dev/null && echo running; } || echo stopped'

on_workers() { # COMMAND on every worker of every slice
    local node
    for node in "${nodes[@]}"; do
        retry gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1" || return
    done
}

# ---- actions

archive() { # FILE: this checkout's last commit
    run git -C "$HERE/.." archive --format=tar.gz --output="$1" HEAD
}

request() { # one attempt to ask for the slice
    local image=${image:-$(runtime_image "$gen")}
    local ask=("${api[@]}" create "$name" "${place[@]}" "--accelerator-type=$type")
    if [ -n "$direct" ]; then
        ask+=("--version=$image")
    elif [ "$slices" -gt 1 ]; then
        ask+=("--runtime-version=$image" "--node-count=$slices" "--node-prefix=$name")
    else
        ask+=("--runtime-version=$image" "--node-id=$name")
    fi
    [ -z "$startup" ] || ask+=("--metadata-from-file=startup-script=$temporary/startup.sh")
    [ -z "$spot" ] || ask+=(--spot)
    [ -z "$reserved" ] || ask+=(--reserved)
    run "${ask[@]}"
}

prepare_startup() { # the code in the bucket, and the script that fetches, installs and runs it when a machine starts
    need_flags
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    archive "$temporary/cddistill.tar.gz"
    retry gcloud storage cp "$temporary/cddistill.tar.gz" "$startup"
    {
        echo '#!/usr/bin/env bash'
        echo 'export HOME=/root'
        echo "until gcloud storage cp $(quoted "$startup") ~/cddistill.tar.gz && $INSTALL; do sleep 30; done"
        job
    } > "$temporary/startup.sh"
    [ -z "$dry_run" ] || sed 's/^/# startup.sh: /' "$temporary/startup.sh"
}

state() { # ACTIVE, lost, none (nothing has this name), unknown (no answer), or gcloud's word for what may still come
    local field="value(state.state)" try said=unknown
    [ -z "$direct" ] || field="value(state)"
    for ((try = 1; try <= TRIES; try++)); do
        said=$(run "${api[@]}" describe "$name" "${place[@]}" "--format=$field" 2>&1) && break
        [[ $said != *NOT_FOUND* && $said != *"not found"* ]] || { echo none && return; }
        say "${said##*$'\n'}"
        said=unknown
        sleep "$PAUSE"
    done
    said=${said##*$'\n'} # after warnings
    case $said in
        ACTIVE | READY) echo ACTIVE ;;
        FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | STOPPED) echo lost ;;
        *) echo "$said" ;;
    esac
}

create() {
    local tries=0 now
    while :; do
        now=$(state)
        [ -z "$dry_run" ] || now=none
        case $now in
            ACTIVE) return 0 ;;
            lost | none | unknown)
                [ $((tries++)) -lt "$TRIES" ] || { say "$name cannot be had: it is $now after $TRIES attempts" && return 1; }
                [ "$now" != lost ] || remove || true
                [ "$now" = unknown ] || request || say "attempt $tries of $TRIES failed"
                ;;
            *) say "$name is $now" ;;
        esac
        [ -z "$dry_run" ] || return 0
        sleep "$POLL"
    done
}

setup() {
    local node folder
    folder=$(mktemp -d)
    archive "$folder/cddistill.tar.gz"
    for node in "${nodes[@]}"; do
        retry gcloud compute tpus tpu-vm scp "$folder/cddistill.tar.gz" "$node:" "${place[@]}" --worker=all || return
    done
    rm -rf "$folder"
    on_workers "$INSTALL"
}

start() {
    on_workers "setsid nohup bash -c $(quoted "$(job)") > /dev/null 2>&1 < /dev/null &"
}

remove() {
    local force=() && [ -n "$direct" ] || force=(--force)
    retry "${api[@]}" delete "$name" "${place[@]}" ${force[@]+"${force[@]}"} --quiet
}

looked() { # the program on all workers: running; stopped, if one has none; or its exit status, an error before a signal
    local said
    said=$(on_workers "$LOOK") || { echo running && return; } # no answer: look again later
    case $said in
        *stopped*) echo stopped ;;
        *running*) echo running ;;
        *) grep -E '^[0-9]+$' <<< "$said" | sort -n | awk '$1 > 0 && $1 < 128 { e = $1 } { m = $1 } END { print e ? e : m }' ;;
    esac
}

babysit() {
    local left=$restarts now status
    while :; do
        status='' now=$(state)
        [ "$now" != ACTIVE ] || status=$(looked)
        [ -z "$dry_run" ] || now=none
        if [[ $now =~ ^(lost|none)$ || $status = stopped ]] || [[ $status =~ ^[0-9]+$ && $status -ge 128 ]]; then
            [ $((left--)) -gt 0 ] || { say "no more restarts: raise --restarts=$restarts" && return 1; }
            create || return 1
            { setup && start; } || say "it does not start yet"
        elif [[ $status =~ ^[0-9]+$ ]]; then
            say "the program has ended with status $status; give the slice back with: delete $name $zone"
            return "$status"
        fi
        [ -z "$dry_run" ] || return 0
        sleep "$POLL"
    done
}

case $action in
    create)
        need type
        [ -z "$startup" ] || prepare_startup
        create || exit 1
        ;;
    setup) setup ;;
    run) need type && need_flags && start ;;
    status) state && on_workers "$LOOK" ;;
    logs) run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" "--worker=$worker" --command="tail -n 100 -F cddistill.log" ;;
    babysit)
        need type && need_flags
        [ -z "$startup" ] || die "--startup is for create: its machines need no babysitter"
        babysit
        ;;
    delete) remove ;;
    *) die "unknown action $action: it is create, setup, run, status, logs, babysit or delete" ;;
esac
