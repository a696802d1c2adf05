#!/usr/bin/env bash
set -Eeo pipefail

setup() {
	mkdir -p "$PGDATA"
	chmod 00700 "$PGDATA" || :
	initdb --username=postgres --auth=trust
}

main() {
	if [ "${1:0:1}" = '-' ]; then
		set -- postgres "$@"
	fi
	if [ "$1" = 'postgres' ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
		setup
	fi
	exec "$@"
}

main "$@"
