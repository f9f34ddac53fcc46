"""Order, retry and schedule of the stages; no tensor is touched here."""

import os

from dreambooth.redaction import redact_logs

# Before prefect, dvc or mlflow is imported: nothing is reported to anyone, and a slow disk may take its time.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    # As in prefect.yaml, for runs by hand and those of flows.serve: flows/automations.py ends what is silent.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}.items():
    os.environ.setdefault(_name, _value)

redact_logs()  # Prefect, DVC and MLflow log what they are given
