#!/usr/bin/env bash
# Plays gcloud here, and curl, hostname, sudo, mount, mountpoint on the workers, according to the name it is called by.
#
# FAKE is a directory:
#   calls           what gcloud was called with, a line each
#   workers         how many hosts a slice has
#   lives/N         what the N-th slice goes through: a line "QUEUED NODE HEALTH" for each look; the last one stays
#   down            workers that ssh does not reach
#   fail            words; a gcloud command that has one of them among its arguments fails, once for every line
#   home/N          the home of worker N; COMMAND runs there, for real
#   bucket/         what is at gs://
# While a slice exists, FAKE/now holds what is left of its life, FAKE/look what the last look saw.
set -euo pipefail

url() { printf '%s' "$FAKE/bucket/${1#gs://}"; }

# A slice that is taken away takes its processes and disks along.
take_away() {
  local path process
  { grep -lsz -x -F -- "FAKE_SLICE=$FAKE" /proc/[0-9]*/environ || true; } | while IFS= read -r path; do
    process=${path#/proc/}
    kill -KILL "${process%/environ}" 2>/dev/null || true
  done
  rm -rf "${FAKE:?}/home"
}

not_found() {
  echo "ERROR: (gcloud) NOT_FOUND: Resource '$1' was not found" >&2
  exit 1
}

fail_if_told() {
  local word
  if [[ ! -s $FAKE/fail ]]; then return; fi
  read -r word <"$FAKE/fail"
  if [[ " $* " == *" $word "* ]]; then
    sed -i 1d "$FAKE/fail"
    echo "ERROR: (gcloud) $word failed" >&2
    exit 1
  fi
}

create() {
  local number worker
  if [[ -e $FAKE/now ]]; then
    echo "ERROR: (gcloud) ALREADY_EXISTS: $1" >&2
    exit 1
  fi
  number=$(($(cat "$FAKE/created" 2>/dev/null || echo 0) + 1))
  echo "$number" >"$FAKE/created"
  cp "$FAKE/lives/$number" "$FAKE/now"
  for ((worker = 0; worker < $(cat "$FAKE/workers"); worker++)); do mkdir -p "$FAKE/home/$worker"; done
}

describe() {
  if [[ ! -e $FAKE/now ]]; then not_found "$1"; fi
  head -n 1 "$FAKE/now" >"$FAKE/look"
  if (($(wc -l <"$FAKE/now") > 1)); then sed -i 1d "$FAKE/now"; fi
  local queued
  read -r queued _ <"$FAKE/look"
  if [[ $queued == SUSPENDED || $queued == FAILED ]]; then take_away; fi
  echo "$queued"
}

on_worker() {
  if grep -qsx "$1" "$FAKE/down"; then
    echo "ssh: connect to host 10.0.0.$1 port 22: Connection timed out"
    return 255
  fi
  mkdir -p "$FAKE/home/$1"
  (cd "$FAKE/home/$1" && env -i "PATH=$PATH" "HOME=$PWD" "FAKE=$FAKE" "FAKE_SLICE=$FAKE" "FAKE_WORKER=$1" bash -c "$2" </dev/null 3>&-)
}

ssh_to() {
  local worker=$1 command=$2 directory=$3 status=0 number children=()
  if [[ $worker != all ]]; then
    on_worker "$worker" "$command"
    return
  fi
  for ((number = 0; number < $(cat "$FAKE/workers"); number++)); do
    on_worker "$number" "$command" >"${directory:-/dev/stdout}${directory:+/$number.log}" 2>&1 &
    children+=($!)
  done
  for number in "${children[@]}"; do wait "$number" || status=$?; done
  return "$status"
}

copy_to() {
  local number
  for ((number = 0; number < $(cat "$FAKE/workers"); number++)); do
    if grep -qsx "$number" "$FAKE/down"; then return 255; fi
    mkdir -p "$FAKE/home/$number"
    cp "$1" "$FAKE/home/$number/${2#*:}"
  done
}

storage() {
  case $1 in
    ls) [[ -e $(url "$2") ]] ;;
    rsync)
      local from=$3 to=$4
      if [[ $from == gs://* ]]; then from=$(url "$from"); fi
      if [[ $to == gs://* ]]; then to=$(url "$to"); fi
      mkdir -p "$to"
      cp -r "$from/." "$to"
      ;;
  esac
}

# flags_of "WORDS OF A COMMAND": the flags on its page of cloud.google.com/sdk/gcloud/reference, read on 2026-12-01, but
# for those of other kinds of slices and disks; a flag that gcloud does not know is refused here as it is there.
flags_of() {
  echo "project quiet format verbosity"
  case $1 in
    "storage ls") echo "recursive" ;;
    "storage rsync") echo "recursive delete-unmatched-destination-objects exclude dry-run" ;;
    *) echo "zone" ;;
  esac
  case $1 in
    *"queued-resources create")
      echo "node-id accelerator-type topology type runtime-version async boot-disk data-disk description guaranteed"
      echo "internal-ips labels metadata metadata-from-file network reserved scopes service-account spot subnetwork tags"
      echo "valid-after-duration valid-after-time valid-until-duration valid-until-time"
      ;;
    *"queued-resources delete") echo "async force" ;;
    *"tpu-vm ssh")
      echo "dry-run force-key-file-overwrite internal-ip plain ssh-flag ssh-key-file strict-host-key-checking worker"
      echo "command output-directory ssh-key-expiration ssh-key-expire-after"
      ;;
    *"tpu-vm scp")
      echo "compress dry-run force-key-file-overwrite internal-ip plain recurse scp-flag ssh-key-file"
      echo "strict-host-key-checking worker ssh-key-expiration ssh-key-expire-after"
      ;;
  esac
}

gcloud() {
  local argument flag known worker=0 command="" directory="" words=()
  printf '%q ' "$@" >>"$FAKE/calls"
  echo >>"$FAKE/calls"
  fail_if_told "$@"
  for argument in "$@"; do
    case $argument in
      --worker=*) worker=${argument#*=} ;;
      --command=*) command=${argument#*=} ;;
      --output-directory=*) directory=${argument#*=} ;;
      --recursive) words+=("$argument") ;;
      --*) ;;
      *) words+=("$argument") ;;
    esac
  done
  if [[ ${words[0]} == storage ]]; then known=$(flags_of "${words[*]:0:2}"); else known=$(flags_of "${words[*]:0:4}"); fi
  for argument in "$@"; do
    flag=${argument%%=*}
    if [[ $flag == --* && " ${known//$'\n'/ } " != *" ${flag#--} "* ]]; then
      echo "ERROR: (gcloud.${words[*]}) unrecognized arguments: $argument" >&2
      exit 2
    fi
  done
  case "${words[*]}" in
    "compute tpus queued-resources create"*) create "${words[4]}" ;;
    "compute tpus queued-resources describe"*) describe "${words[4]}" ;;
    "compute tpus queued-resources delete"*)
      if [[ ! -e $FAKE/now ]]; then not_found "${words[4]}"; fi
      take_away
      rm "$FAKE/now"
      ;;
    "compute tpus tpu-vm describe"*) cut -d ' ' -f 2- "$FAKE/look" | tr ' ' '\t' ;;
    "compute tpus tpu-vm ssh"*) ssh_to "$worker" "$command" "$directory" ;;
    "compute tpus tpu-vm scp"*) copy_to "${words[4]}" "${words[5]}" ;;
    "storage "*) storage "${words[@]:1}" ;;
    *)
      echo "ERROR: (gcloud) Invalid choice: ${words[*]}" >&2
      exit 2
      ;;
  esac
}

# What the installer of uv leaves: a program that makes an empty environment and notes what it was asked to install.
installer() {
  cat <<'END'
mkdir -p "$UV_UNMANAGED_INSTALL"
cat >"$UV_UNMANAGED_INSTALL/uv" <<'UV'
#!/usr/bin/env bash
case $1 in
  --version) echo "uv 0.13.9" ;;
  venv) mkdir -p "${@: -1}/bin" ;;
  pip) if [[ -e $FAKE/no_network ]]; then exit 1; fi ;;
esac
echo "$FAKE_WORKER $*" >>"$FAKE/uv"
UV
chmod +x "$UV_UNMANAGED_INSTALL/uv"
END
}

case ${0##*/} in
  gcloud) gcloud "$@" ;;
  curl) installer ;;
  hostname) echo "t1v-fake-w-$FAKE_WORKER" ;;
  sudo) "$@" ;;
  mountpoint) [[ -e $FAKE/mounted.$FAKE_WORKER ]] ;;
  mount)
    echo "$FAKE_WORKER $*" >>"$FAKE/mounts"
    touch "$FAKE/mounted.$FAKE_WORKER"
    ;;
esac
