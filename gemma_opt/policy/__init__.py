"""The filter map: which role every module plays, and what a recipe will do to each of them.

`plan` says it before a single weight is loaded. The stages then do what the plan says and compare what they touched with
it.
"""

from gemma_opt.policy.counts import dropped_count, kept_channels, kept_rank, pool_size, saves
from gemma_opt.policy.planning import plan, plan_stages, refuse_context
from gemma_opt.policy.roles import Role, main_parameter, role_of
from gemma_opt.policy.rows import Plan, PlanRow, Progress, factor_rows, planned_weights, quiet

__all__ = [
    "Plan",
    "PlanRow",
    "Progress",
    "Role",
    "dropped_count",
    "factor_rows",
    "kept_channels",
    "kept_rank",
    "main_parameter",
    "plan",
    "plan_stages",
    "planned_weights",
    "pool_size",
    "quiet",
    "refuse_context",
    "role_of",
    "saves",
]
