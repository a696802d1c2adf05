#!/bin/bash
set -eo pipefail
shopt -s nullglob

if [ "${1:0:1}" = '-' ]; then
	set -- mariadbd "$@"
fi
if [ "$1" = 'mariadbd' ] && [ ! -d /var/lib/mysql/mysql ]; then
	mariadb-install-db --user=mysql --skip-test-db --auth-root-authentication-method=normal >/dev/null
fi
exec "$@"
