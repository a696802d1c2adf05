#!/bin/sh
set -e
grep -q worker_processes /etc/nginx/nginx.conf || echo "no worker_processes in nginx.conf" >&2
