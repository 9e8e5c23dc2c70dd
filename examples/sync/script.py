"""An approval in a script: `python script.py`."""

from aiokeyless.sync import KeylessClient

with KeylessClient() as client:
    operation = client.request_approval("C0FFEE", operation_payload="Pay 40 to Alice", require_auth_type="biom")
    print(operation.state)
