"""The automations of the server as code: end runs whose worker died, start them again, tell people; applied by name.

A run sends a heartbeat every 30 s: on a worker by prefect.yaml, else by flows/__init__.py.
Applying twice changes nothing; a changed one is replaced.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification

from dreambooth.errors import PipelineError
from flows.program import has_server, reached

FLOWS = ["personalize", "retrain", "promote", "generate"]
Labels = dict[str, str | list[str]]
RUN: Labels = {"prefect.resource.id": "prefect.flow-run.*"}
OURS: Labels = {"prefect.resource.role": "flow", "prefect.resource.name": FLOWS}
SILENCE = 65.0  # seconds: one heartbeat of 30 s may be lost, and the next one 5 s late
TRIES = ("1", "2")  # of the run that crashed: after these another one is started, so three at most
LONGEST = timedelta(days=30)  # of a run that is started again once it crashed
HOOK = "dreambooth-webhook"
HEARTBEAT = "prefect.flow-run.heartbeat"
ENDS = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "TimedOut")}
PAYLOAD = (
    '{"flow run": "{{ flow_run.name }}", "flow": "{{ flow.name }}", "state": "{{ flow_run.state.name }}", '
    '"message": {{ (flow_run.state.message or "") | tojson }}, "address": "{{ flow_run | ui_url }}"}'
)


def zombies() -> AutomationCore:
    """End a run that has sent no heartbeat for SILENCE; the docs of Prefect call it a zombie."""
    return AutomationCore(
        name="dreambooth: end runs whose worker died",
        description="A run without a heartbeat is Crashed, so that its slot is free and it can be started again.",
        trigger=EventTrigger(
            after={HEARTBEAT},
            expect={HEARTBEAT, *ENDS},
            match=ResourceSpecification(RUN),
            match_related=ResourceSpecification(OURS),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=SILENCE),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, message=f"no heartbeat for {SILENCE:.0f} s", name=None, force=False
            )
        ],
    )


def restart() -> AutomationCore:
    """Start a crashed run again, on any worker; a training continues from its checkpoint. After three times no more.

    Only one that was Running: what crashes before, as it finds no checkout, is not counted and would never end.
    """
    return AutomationCore(
        name="dreambooth: start crashed runs again",
        description="What was done is done for DVC; a training continues from its newest checkpoint.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Running"},
            expect={"prefect.flow-run.Crashed"},
            match=ResourceSpecification({**RUN, "prefect.run-count": list(TRIES)}),
            match_related=ResourceSpecification({**OURS, "prefect.resource.name": ["personalize"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
            within=LONGEST,
        ),
        actions=[
            ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="its worker died", force=False)
        ],
    )


def notification(hook: Any) -> AutomationCore:
    """Call a webhook when a run has failed or an approval waits.

    Args:
        hook: id of the block that holds the address.
    """
    names = ("Failed", "Crashed", "TimedOut", "Suspended")
    return AutomationCore(
        name="dreambooth: tell people",
        description="A run has failed, or waits for a person.",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{name}" for name in names},
            match=ResourceSpecification(RUN),
            match_related=ResourceSpecification(OURS),
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[CallWebhook(block_document_id=hook, payload=PAYLOAD)],
    )


def apply(webhook: str | None = None) -> list[str]:
    """Make the automations of this project on the server, or replace those of the same name; return their names.

    Args:
        webhook: where to post failures and waiting approvals; None leaves that out, or as it is.

    Raises:
        PipelineError: no server is named, or it does not answer.
    """
    if not has_server():  # they would lie in the database of a server that ends with this process
        raise PipelineError("automations live on a server that stays; name it: PREFECT_API_URL=http://HOST:4200/api")
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise PipelineError(f"--webhook: should be an address that begins with http:// or https:// (got {webhook!r})")
    with reached(remedy=""):
        wanted = [zombies(), restart(), *([notification(_save_hook(webhook))] if webhook else [])]
        with get_client(sync_client=True) as client:
            _replace(client, wanted)
    return [one.name for one in wanted]


def _replace(client: SyncPrefectClient, wanted: Sequence[AutomationCore]) -> None:
    for one in wanted:
        for old in client.read_automations_by_name(one.name):
            client.delete_automation(old.id)
        client.create_automation(one)


def _save_hook(webhook: str) -> Any:
    """Keep the address as a secret of the server."""
    from prefect.blocks.webhook import Webhook

    return Webhook.model_validate({"method": "POST", "url": webhook}).save(HOOK, overwrite=True)
