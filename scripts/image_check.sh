#!/usr/bin/env bash
# Builds the Dockerfile without a container engine, starts the server from the image with the
# image's own entry point, user and environment, waits for its health check, sends it a request.
# Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap).
#
#   WORK     working folder, kept between runs (default: a cache folder of the user)
#   PORT     port on this machine (default 18000)
#   PYTHON   interpreter for this script's own helper (default python3)
set -euo pipefail
cd "$(dirname "$0")/.."

WORK="${WORK:-${XDG_CACHE_HOME:-$HOME/.cache}/dynamic-lora-image-check}"
PORT="${PORT:-18000}"
PYTHON="${PYTHON:-python3}"
IMAGE=localhost/dynamic-lora:check
BASE="localhost/$(sed -n 's/^ARG BASE=//p' Dockerfile)"
SUITE=bookworm

say() { printf '\n== %s\n' "$*"; }

need() {
  command -v "$1" >/dev/null || { echo "$1 is missing: apt-get install buildah debootstrap" >&2; exit 1; }
}

# Another server there would answer in the image's place.
need_port() {
  "$PYTHON" -c 'import socket, sys; socket.create_server(("127.0.0.1", int(sys.argv[1]))).close()' \
    "$PORT" 2>/dev/null || { echo "port $PORT is taken: PORT=... names another" >&2; exit 1; }
}

store() {
  buildah --root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs "$@"
}

# A base image from the distribution's packages, so that no image registry is asked.
base_image() {
  store inspect --type image "$BASE" >/dev/null 2>&1 && return
  say "base image $BASE ($SUITE)"
  rm -rf "$WORK/rootfs"
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates \
    "$SUITE" "$WORK/rootfs"
  rm -rf "$WORK/rootfs/var/cache/apt/archives" "$WORK/rootfs/var/lib/apt/lists"
  local container
  container="$(store from scratch)"
  store add --quiet "$container" "$WORK/rootfs" / >/dev/null
  store commit --quiet "$container" "$BASE" >/dev/null
  store rm "$container" >/dev/null
  rm -rf "$WORK/rootfs"
}

main() {
  [ "$(id -u)" = 0 ] || { echo "root is needed: debootstrap and chroot isolation" >&2; exit 1; }
  need buildah
  need debootstrap
  need_port
  mkdir -p "$WORK"
  base_image

  # pip inside reads this machine's pip settings, and the files and folders which they name.
  "$PYTHON" scripts/pip_mounts.py "$WORK/pip.conf" >"$WORK/mounts"
  mapfile -t mounts <"$WORK/mounts"

  say "build"
  store bud --isolation chroot --format docker --pull-never "${mounts[@]}" \
    --build-arg BASE="$BASE" --tag "$IMAGE" .

  say "run"
  container="$(store from --pull-never "$IMAGE")"
  server=
  trap finish EXIT
  read_image
  # Job control gives the server a process group of its own, so that all of it can be ended.
  set -m
  store run --isolation chroot "${mounts[@]}" \
    --env DYNAMIC_LORA_LISTEN_PORT="$PORT" --env DYNAMIC_LORA_LISTEN_HOST=127.0.0.1 \
    "$container" -- "${command[@]}" &
  server=$!
  set +m
  wait_until_healthy
  "$PYTHON" scripts/image_request.py "http://127.0.0.1:$PORT"
  check_user
  say "image check passed"
}

# The image's own command line and health check.
read_image() {
  store inspect --type image "$IMAGE" >"$WORK/image.json"
  mapfile -t command < <("$PYTHON" - "$WORK/image.json" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
print(*config["Entrypoint"], *config["Cmd"], sep="\n")
PY
  )
  mapfile -t health < <("$PYTHON" - "$WORK/image.json" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))["Docker"]["config"]
kind, *words = config["Healthcheck"]["Test"]
assert kind == "CMD", kind
print(*words, sep="\n")
PY
  )
}

wait_until_healthy() {
  local attempt
  for attempt in $(seq 120); do
    kill -0 "$server" 2>/dev/null || { echo "the server ended before it was ready" >&2; return 1; }
    if store run --isolation chroot --env DYNAMIC_LORA_LISTEN_PORT="$PORT" "$container" -- "${health[@]}" \
      2>/dev/null; then
      echo "health check passed (attempt $attempt)"
      return
    fi
    sleep 5
  done
  echo "not healthy after 120 attempts" >&2
  return 1
}

check_user() {
  local user
  user="$(store run --isolation chroot "$container" -- id -u)"
  [ "$user" != 0 ] || { echo "the image runs as root" >&2; return 1; }
  echo "runs as uid $user"
}

finish() {
  if [ -n "$server" ]; then
    kill -TERM -- "-$server" 2>/dev/null || true
    for _ in $(seq 30); do
      kill -0 -- "-$server" 2>/dev/null || break
      sleep 1
    done
    kill -KILL -- "-$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  store rm "$container" >/dev/null
}

main "$@"
