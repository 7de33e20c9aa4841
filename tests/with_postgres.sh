#!/usr/bin/env bash
# Run a command beside a PostgreSQL server of its own, whose address is in LEGACY1BIT_POSTGRES. The
# server is installed from the system's packages where it is missing, and is gone in the end.
set -euo pipefail

find_programs() { find /usr/lib/postgresql -name initdb -printf '%h\n' 2> /dev/null | sort -V | tail -1; }

programs=$(find_programs)
if [ -z "$programs" ]; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -qq --no-install-recommends postgresql \
        < /dev/null > /dev/null
    programs=$(find_programs)
fi

# The server does not run as root.
as=()
if [ "$(id -u)" = 0 ]; then as=(runuser -u postgres --); fi
folder=$("${as[@]}" mktemp -d)
stop() {
    "${as[@]}" "$programs/pg_ctl" -D "$folder/data" -m immediate stop > /dev/null 2>&1 || true
    rm -rf "$folder"
}
trap stop EXIT
"${as[@]}" "$programs/initdb" -D "$folder/data" -U tester -A trust --no-sync > /dev/null
"${as[@]}" "$programs/pg_ctl" -D "$folder/data" -w -l "$folder/log" \
    -o "-c listen_addresses= -c unix_socket_directories=$folder -c fsync=off" start > /dev/null
chmod o+rx "$folder"
LEGACY1BIT_POSTGRES="postgresql+psycopg2://tester@/postgres?host=$folder" "$@"
