#!/bin/sh
set -e
# An option, or something that isn't a program, is for node.
if [ "${1#-}" != "${1}" ] || [ -z "$(command -v "${1}")" ]; then
  set -- node "$@"
fi
exec "$@"
