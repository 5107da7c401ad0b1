#!/usr/bin/env bash
# Runs an S3 server with a bucket on this machine until Ctrl-C: `make s3`, or `PORT=9001 make s3`. Data is in memory.
set -euo pipefail
port=${PORT:-9000} bucket=${BUCKET:-prefill-router}

if (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    echo "s3: port $port is taken: set PORT to another port" >&2
    exit 1
fi
moto_server --host 127.0.0.1 --port "$port" > /dev/null 2>&1 &
server=$!
# SIGKILL: the server has nothing to save, and a Python process may miss other signals while it exits.
trap 'kill -KILL "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true' EXIT
trap 'exit 0' INT TERM

tries=0
until curl --silent --fail --output /dev/null --request PUT "http://127.0.0.1:$port/$bucket"; do
    if ! kill -0 "$server" 2> /dev/null || ((++tries > 150)); then
        echo "s3: the server does not start: run moto_server --host 127.0.0.1 --port $port to see why" >&2
        exit 1
    fi
    sleep 0.2
done

cat << EOF
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=dev AWS_SECRET_ACCESS_KEY=dev AWS_REGION=us-east-1
# The bucket is s3://$bucket. Ctrl-C stops the server.
EOF
wait "$server"
