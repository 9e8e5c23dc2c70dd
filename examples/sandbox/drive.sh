#!/usr/bin/env bash
# A test of a shop in any language: run `aiokeyless sandbox`, export what it prints, then run this.
set -euo pipefail
id=order-$RANDOM; ask() { curl -sS --fail-with-body -w '\n' -H "X-Api-Key: $KEYLESS_API_KEY" "$KEYLESS_BASE_URL/$1" "${@:2}"; }
ask v2/users/C0FFEE/operations --json '{"operationId": "'$id'", "operationPayload": "Pay 40 to Alice"}'  # the shop asks
ask sandbox/fail --json '{"status": 503, "times": 1}'                         # the service fails once,
ask v2/operations/$id && exit 1                                               # so the shop must ask again
ask sandbox/decline --json '{"operationId": "'$id'", "errorCode": 30004}'     # the face does not match,
ask sandbox/approve --json '{"operationId": "'$id'"}'                         # the second time it does,
ask v2/operations/$id | grep '"state":"approved"'                             # and the order is paid
