#!/bin/sh
set -e
if [ "$1" = "nginx" ]; then
  for f in $(find /docker-entrypoint.d/ -follow -type f | sort); do
    case "$f" in
      *.sh) [ -x "$f" ] && "$f" ;;
    esac
  done
fi
exec "$@"
