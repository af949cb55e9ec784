#!/usr/bin/env bash
# Certificates for Ray's TLS: an authority for a cluster, and by it one for each node, good for a year.
#
#   cluster/tls.sh authority FOLDER           ca.crt and ca.key, unless they are there. Keep them like the token: who has
#                                             the key can make a node
#   cluster/tls.sh node AUTHORITY FOLDER NAME...   tls.crt, tls.key, ca.crt of a node with these addresses and host names;
#                                             Ray hangs at the start where one that it is reached by is missing
set -euo pipefail
umask 077

certificate() { openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 "$@" 2>/dev/null; }

authority() {
  local folder=$1
  mkdir -p "$folder"
  [[ -e $folder/ca.key ]] || certificate -days 3650 -subj /CN=betakd-authority \
    -addext keyUsage=critical,keyCertSign -keyout "$folder/ca.key" -out "$folder/ca.crt"
}

node() {
  local authority=$1 folder=$2 name names=""; shift 2
  for name in "$@"; do
    [[ $name =~ ^[0-9.]+$|: ]] && names+=,IP:$name || names+=,DNS:$name
  done
  mkdir -p "$folder"
  certificate -CA "$authority/ca.crt" -CAkey "$authority/ca.key" -days 365 -subj /CN=betakd-node \
    -addext "subjectAltName=${names#,}" -addext basicConstraints=critical,CA:FALSE \
    -keyout "$folder/tls.key" -out "$folder/tls.crt"
  cp "$authority/ca.crt" "$folder/ca.crt"
}

case ${1:-} in
  authority) (($# == 2)) && authority "$2" ;;
  node) (($# > 3)) && node "${@:2}" ;;
  *) sed -n '2,8s/^# \?//p' "$0" >&2; exit 2 ;;
esac
