"""The flows of clones and retraining with a registry that only counts: what the tests of clones start."""

import flow_program

import flows.clone
import flows.retrain
from dreambooth import registry, versions

registry.register = flow_program.register
versions.find, versions.find_export = flow_program.find, flow_program.find_export
versions.is_there = lambda root: True

personalize = flows.clone.personalize
retrain = flows.retrain.retrain
