# shellcheck shell=bash
# The one file that knows how a slice is rented and reached: queued resources of Cloud TPU, through gcloud.
#
# Another way to rent one replaces this file and keeps its functions (docs/pods.md):
#   provision_check                      stop with a message if a variable is wrong
#   provision_state ASSUMED              print "STATE DETAIL", STATE one of absent, waiting, ready, lost, deleting;
#                                        a dry run prints the command and ASSUMED
#   provision_create, provision_delete   ask for the slice, give it back
#   provision_workers                    print the number of hosts
#   provision_topology                   print the slice as `jgrpo plan --topology` names it
#   provision_ssh_all DIRECTORY COMMAND  COMMAND on all hosts at once; what host N writes goes to DIRECTORY/N.log, what
#                                        goes wrong on the way to DIRECTORY/stderr
#   provision_ssh WORKER COMMAND         COMMAND on one host, or on "all", output here
#   provision_copy FILE PATH             FILE to PATH in the home of all hosts

# Chips of v5e and v6e slices, and their topology.
readonly -A FLAT=([1]=1x1 [4]=2x2 [8]=2x4 [16]=4x4 [32]=4x8 [64]=8x8 [128]=8x16 [256]=16x16)
# TensorCores (two a chip) of v4 and v5p slices, by which these are named, and their default topology.
readonly -A CUBIC=([8]=2x2x1 [16]=2x2x2 [32]=2x2x4 [64]=2x4x4 [128]=4x4x4 [256]=4x4x8 [512]=4x8x8 [1024]=8x8x8)
readonly -A RUNTIMES=(["v4"]=tpu-ubuntu2204-base ["v5litepod"]=v2-alpha-tpuv5-lite ["v5p"]=v2-alpha-tpuv5
  ["v6e"]=v2-alpha-tpuv6e)

provision_check() {
  check POD_NAME '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' "lower-case letters, digits and -, a letter first" granite
  check PROJECT '[a-z][-a-z0-9:.]*[a-z0-9]' "the id of a Google Cloud project" my-project
  check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone that has this generation of TPU" us-west4-a
  check_accelerator
  local name
  for name in SPOT RESERVED INTERNAL_IPS; do
    printf -v "$name" '%s' "${!name:-0}"
    check "$name" '[01]' "0 or 1" 1
  done
  if [[ $SPOT == 1 && $RESERVED == 1 ]]; then
    mistake "SPOT=1 and RESERVED=1 exclude each other; set one of them to 0"
  fi
  if [[ -n ${RESERVATION_PROJECT:-} && $RESERVED != 1 ]]; then
    mistake "RESERVATION_PROJECT names where a shared reservation is; set RESERVED=1 with it"
  fi
  check_optional RUNTIME_VERSION '[a-z0-9][-a-z0-9.]*' "a TPU software version" v2-alpha-tpuv5-lite
  check_optional VALID_UNTIL '([0-9]+[smhd])+' "a duration such as 6h, after which a request in the queue expires" 6h
  check_optional SERVICE_ACCOUNT '[^@ ]+@[^@ ]+' "the e-mail address of a service account" \
    tpu@my-project.iam.gserviceaccount.com
  check_optional DATA_DISK 'projects/[^/ ]+/zones/[^/ ]+/disks/[^/ ,]+' "the full name of a disk" \
    projects/my-project/zones/us-west4-a/disks/weights
}

check_accelerator() {
  check ACCELERATOR '(v4|v5litepod|v5p|v6e)-[0-9]+' "v4-N, v5litepod-N, v5p-N or v6e-N" v5litepod-64
  GENERATION=${ACCELERATOR%-*} SIZE=${ACCELERATOR##*-}
  local sizes=()
  if [[ $GENERATION == v5litepod || $GENERATION == v6e ]]; then
    TOPOLOGY=${FLAT[$SIZE]-} sizes=("${!FLAT[@]}")
  else
    TOPOLOGY=${CUBIC[$SIZE]-} sizes=("${!CUBIC[@]}")
  fi
  if [[ -z $TOPOLOGY ]]; then
    mistake "ACCELERATOR is '$ACCELERATOR'; sizes of $GENERATION are" \
      "$(printf '%s\n' "${sizes[@]}" | sort -n | paste -s -d ' ' -): export ACCELERATOR=$GENERATION-64"
  fi
}

provision_topology() { echo "${GENERATION/litepod/e}:$TOPOLOGY"; }

# Slices of v5e and v6e with up to 8 chips are one host; all others have four chips a host.
provision_workers() {
  local chips=$SIZE
  if [[ $GENERATION == v4 || $GENERATION == v5p ]]; then
    chips=$((SIZE / 2))
  elif ((SIZE <= 8)); then
    chips=4
  fi
  echo $((chips / 4))
}

# tpus GROUP VERB ARGUMENTS...: the gcloud command, in TPUS.
tpus() {
  TPUS=(gcloud compute tpus "$@" "--project=$PROJECT" "--zone=$ZONE" --quiet)
}

provision_create() {
  tpus queued-resources create "$POD_NAME" "--node-id=$POD_NAME" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=${RUNTIME_VERSION:-${RUNTIMES[$GENERATION]}}"
  if [[ $SPOT == 1 ]]; then TPUS+=(--spot); fi
  if [[ $RESERVED == 1 ]]; then TPUS+=(--reserved); fi
  if [[ $INTERNAL_IPS == 1 ]]; then TPUS+=(--internal-ips); fi
  if [[ -n ${RESERVATION_PROJECT:-} ]]; then TPUS+=("--reservation-host-project=$RESERVATION_PROJECT"); fi
  if [[ -n ${VALID_UNTIL:-} ]]; then TPUS+=("--valid-until-duration=$VALID_UNTIL"); fi
  if [[ -n ${NETWORK:-} ]]; then TPUS+=("--network=$NETWORK"); fi
  if [[ -n ${SUBNETWORK:-} ]]; then TPUS+=("--subnetwork=$SUBNETWORK"); fi
  if [[ -n ${SERVICE_ACCOUNT:-} ]]; then TPUS+=("--service-account=$SERVICE_ACCOUNT"); fi
  if [[ -n ${LABELS:-} ]]; then TPUS+=("--labels=$LABELS"); fi
  if [[ -n ${DATA_DISK:-} ]]; then TPUS+=("--data-disk=source=$DATA_DISK,mode=read-only"); fi
  run "${TPUS[@]}"
}

provision_delete() {
  tpus queued-resources delete "$POD_NAME" --force
  run "${TPUS[@]}"
}

# ask COMMAND...: its answer, "NOT_FOUND" if what is asked for does not exist; any other failure is one.
ask() {
  local answer errors
  errors=$(mktemp)
  if answer=$("$@" 2>"$errors"); then
    echo "$answer"
  elif grep -q NOT_FOUND "$errors"; then
    echo NOT_FOUND
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
  rm -f "$errors"
}

provision_state() {
  local queued node health answer
  tpus queued-resources describe "$POD_NAME" '--format=value(state.state)'
  if [[ $DRY_RUN == 1 ]]; then
    print_command "${TPUS[@]}"
    echo "$1 assumed"
    return
  fi
  queued=$(ask "${TPUS[@]}") || return
  case $queued in
    NOT_FOUND) echo "absent no queued resource of this name" ;;
    ACTIVE)
      tpus tpu-vm describe "$POD_NAME" '--format=value(state,health)'
      answer=$(ask "${TPUS[@]}") || return
      read -r node health <<<"$answer"
      echo "$(node_state "$node") $queued, node $node, health ${health:-not reported}"
      ;;
    DELETING) echo "deleting $queued" ;;
    SUSPENDING | SUSPENDED | FAILED) echo "lost $queued" ;;
    *) echo "waiting $queued" ;;
  esac
}

node_state() {
  case $1 in
    READY) echo ready ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) echo waiting ;;
    *) echo lost ;;
  esac
}

# Options of ssh that all connections take; SSH_FLAGS are options of gcloud, such as --internal-ip.
ssh_command() {
  local flags
  read -ra flags <<<"${SSH_FLAGS:-}"
  tpus tpu-vm ssh "$POD_NAME" "--worker=$1" "--command=$2" --ssh-flag=-oConnectTimeout=30 \
    --ssh-flag=-oServerAliveInterval=30 "${flags[@]}"
}

provision_ssh_all() {
  ssh_command all "$2"
  TPUS+=("--output-directory=$1")
  if [[ $DRY_RUN == 1 ]]; then print_command "${TPUS[@]}"; else "${TPUS[@]}" </dev/null >"$1/stdout" 2>"$1/stderr"; fi
}

provision_ssh() {
  ssh_command "$1" "$2"
  run "${TPUS[@]}" </dev/null
}

provision_copy() {
  local flags
  read -ra flags <<<"${SSH_FLAGS:-}"
  tpus tpu-vm scp "$1" "$POD_NAME:$2" --worker=all "${flags[@]}"
  run "${TPUS[@]}" </dev/null
}
