#!/bin/sh
set -e
: "${NAME:=world}"
sed -n 1p /etc/passwd
exec app "$NAME"
