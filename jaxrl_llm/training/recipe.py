"""How a run trained its model, for the card of what it exports."""

from typing import Any

from jaxrl_llm.config.schema import Config


def recipe(config: Config, step: int) -> dict[str, Any]:
    """The settings that say what was learned from what, by their keys.

    No folder of the run and no setting of a service is among them: cards are published.

    Args:
      step: after which the weights were saved.
    """
    data, rollout, actor = config.data, config.rollout, config.actor
    algorithm, rewards = config.algorithm, config.reward
    found = {
        "step": step,
        "trainer.total_training_steps": config.trainer.total_training_steps,
        "data.train.path": data.train.path,
        "data.train_batch_size": data.train_batch_size,
        "data.max_prompt_length": data.max_prompt_length,
        "rollout.n": rollout.n,
        "rollout.max_response_length": rollout.max_response_length,
        "reward.functions": {term.name: term.weight for term in rewards.functions},
        "algorithm.adv_estimator": algorithm.adv_estimator,
        "actor.policy_loss.loss_mode": actor.policy_loss.loss_mode,
        "actor.loss_agg_mode": actor.loss_agg_mode,
        "actor.optim.name": actor.optim.name,
        "actor.optim.lr": actor.optim.lr,
    }
    if actor.lora:
        found["actor.lora"] = actor.lora.model_dump(exclude={"path"})
    if how := config.distillation:
        found |= {
            "distillation.teacher.path": how.teacher.path,
            "distillation.mode": how.mode,
            "distillation.coef": how.coef,
        }
        if not how.with_rewards:  # they were measured at most
            del found["reward.functions"], found["algorithm.adv_estimator"]
    if rewards.model:
        found["reward.model.path"] = rewards.model.path
    if actor.use_kl_loss:
        found["actor.kl_loss_coef"] = actor.kl_loss_coef
    if algorithm.use_kl_in_reward:
        found["algorithm.kl_ctrl.kl_coef"] = algorithm.kl_ctrl.kl_coef
    return found
