"""Every metric that a run logs: what it is, where it should be, and what to do if not.

The documentation's page of metrics is this table, and a test holds the table against
what runs write. It needs nothing but Python.
"""

import re
from typing import NamedTuple


class Metric(NamedTuple):
    """One row of the table."""

    name: str
    """The name in metrics.jsonl. A word in capitals stands for a name or number,
    and {a,b} for either of them."""
    formula: str
    """How it is computed, with its unit."""
    healthy: str = ""
    """Where it should be; empty for what says nothing about health."""
    remedy: str = ""
    """What to do where it is not."""


def find(name: str) -> Metric | None:
    """The row that a logged name belongs to; None if the table has none."""
    for metric, pattern in zip(METRICS, _PATTERNS, strict=True):
        if pattern.fullmatch(name):
            return metric
    return None


GROUPS = {
    "actor": "The policy's update",
    "distillation": "The teacher",
    "critic": "Rewards, advantages and the critic",
    "sft": "Supervised fine-tuning",
    "rm": "Reward models",
    "dpo": "DPO",
    "rewards": "DPO",
    "logps": "DPO",
    "reward": "Reward functions",
    "reward_errors": "Reward functions",
    "response_length": "Lengths",
    "prompt_length": "Lengths",
    "agent": "Episodes with an environment",
    "rollout": "Generation",
    "mismatch": "Sampler against trainer",
    "rollout_corr": "Rollout correction",
    "training": "The data and what is trained on",
    "val-core": "Validation",
    "val-aux": "Validation",
    "perf": "Speed and memory",
    "timing_s": "Time by phase",
}
"""Headings by the first part of a name."""

METRICS = (
    Metric(
        "actor/loss",
        "pg_loss - entropy_coeff * entropy + kl_loss_coef * kl_loss",
        "finite; it need not fall, as its zero moves with the advantages",
    ),
    Metric(
        "actor/pg_loss",
        "the policy loss of every response token, put together by actor.loss_agg_mode",
        "near 0, of either sign",
    ),
    Metric(
        "actor/entropy",
        "mean entropy of the policy's next token, nats",
        "falls slowly; over 0.1",
        "if it falls to 0: raise actor.entropy_coeff or actor.clip_ratio_high, lower "
        "actor.optim.lr. If it explodes: lower actor.optim.lr or the temperature",
    ),
    Metric(
        "actor/router_aux_loss",
        "how unevenly tokens are spread over experts, before "
        "actor.router_aux_loss_coef: the experts of a token where all are chosen alike",
        "near that, and no larger than it was",
        "raise actor.router_aux_loss_coef",
    ),
    Metric(
        "actor/route_agreement",
        "the share of tokens and layers whose router would choose the experts that are "
        "replayed; with actor.router_replay",
        "near 1",
        "lower actor.optim.lr, or make fewer updates of a step",
    ),
    Metric(
        "actor/expert_load_max",
        "how often the most chosen expert is chosen, over the mean of all, in all "
        "layers together; with actor.router_aux_loss_coef",
        "steady",
        "raise actor.router_aux_loss_coef",
    ),
    Metric(
        "actor/kl_loss",
        "KL(policy || reference) by actor.kl_loss_type, nats per token",
        "below 0.1 for most tasks, and growing slowly",
        "raise actor.kl_loss_coef, or lower actor.optim.lr",
    ),
    Metric(
        "actor/ppo_kl",
        "mean of old - new log-probability of the tokens, nats",
        "0 with one update a step; else below 0.05",
        "fewer actor.ppo_epochs, a larger actor.ppo_mini_batch_size or a lower "
        "actor.optim.lr",
    ),
    Metric(
        "actor/pg_clipfrac",
        "share of tokens whose gradient the clipped ratio took away",
        "0 with one update a step; else below 0.2",
        "as for actor/ppo_kl",
    ),
    Metric(
        "actor/pg_clipfrac_lower",
        "share of tokens that the dual clip (actor.clip_ratio_c) bounds",
        "below 0.01",
        "as for actor/ppo_kl",
    ),
    Metric(
        "actor/grad_norm",
        "global norm of the gradient before actor.optim.clip_grad, mean of the updates",
        "steady, within a few times its median",
        "if it spikes: lower actor.optim.lr, look at that step's completions. If it is "
        "0: see training/groups_all_equal",
    ),
    Metric(
        "actor/update_skipped",
        "updates of the step that were left out because the gradient is not finite",
        "0",
        "the note in the terminal and the report says what was not finite; after "
        "trainer.max_skipped_steps steps without any update the run stops",
    ),
    Metric("actor/lr", "learning rate of the step's last update, by the schedule"),
    Metric(
        "distillation/loss",
        "distance from the teacher by distillation.mode, nats, before "
        "distillation.coef, put together by actor.loss_agg_mode; with reverse_kl the "
        "mean of log p_policy - log p_teacher of sampled tokens",
        "falls; with reverse_kl it is noisy and may be under 0",
        "raise actor.optim.lr; more responses; a teacher nearer to the policy",
    ),
    Metric(
        "distillation/reverse_kl",
        "log p_policy - log p_teacher of sampled tokens, mean over tokens, nats: an "
        "estimate of KL(policy || teacher)",
        "falls towards 0",
        "as for distillation/loss",
    ),
    Metric(
        "distillation/teacher_logprob",
        "log-probability by the teacher of sampled tokens, mean over tokens, nats",
        "rises towards -distillation/teacher_entropy",
        "far below it, the policy writes what the teacher never would: warm it up by "
        "supervised training on the teacher's answers",
    ),
    Metric(
        "distillation/teacher_entropy",
        "entropy of the teacher's distribution of the same tokens, mean, nats",
        "steady",
    ),
    Metric(
        "distillation/{student,teacher}_mass",
        "probability that policy or teacher gives the teacher's distillation.topk "
        "tokens, mean over tokens (forward_kl_topk)",
        "the teacher's over 0.95; the student's rises to it",
        "raise distillation.topk",
    ),
    Metric(
        "actor/reward_kl_penalty",
        "KL taken off the rewards (algorithm.use_kl_in_reward), nats per token",
        "near algorithm.kl_ctrl.target_kl with kl_ctrl.type adaptive",
        "raise algorithm.kl_ctrl.kl_coef",
    ),
    Metric("actor/reward_kl_penalty_coeff", "its weight in this step"),
    Metric(
        "critic/rewards/{mean,max,min}",
        "total reward of the responses that were generated",
        "the mean rises; max and min differ",
        "if all are equal: is the task too hard or too easy, does the answer's form "
        "match what the reward looks for? Read the completions in the report",
    ),
    Metric("critic/score/mean", "the same mean by veRL's other name"),
    Metric(
        "critic/rewards_kept/{mean,max,min}",
        "total reward of the responses that algorithm.filter_groups kept",
        "the mean is near the middle of the scale",
    ),
    Metric(
        "critic/advantages/{mean,max,min}",
        "advantage of the responses that are trained on, mean over their tokens",
        "mean near 0; max and min within some units of 0",
        "if all are 0: see training/groups_all_equal",
    ),
    Metric("critic/values/mean", "mean value that the critic gives a response token"),
    Metric("critic/returns/mean", "mean of what the critic should have given"),
    Metric(
        "critic/vf_loss",
        "clipped squared error of the values, put together by critic.loss_agg_mode",
        "falls",
    ),
    Metric(
        "critic/vf_clipfrac",
        "share of tokens where critic.cliprange_value decides the value loss",
        "below 0.2",
        "raise critic.cliprange_value, or lower critic.optim.lr",
    ),
    Metric("critic/vpred_mean", "mean value after the update's forward pass"),
    Metric(
        "critic/vf_explained_var",
        "1 - variance(returns - values) / variance(returns)",
        "rises over 0 within some tens of steps, towards 1",
        "raise critic.optim.lr, or warm it up first with trainer.critic_warmup",
    ),
    Metric(
        "critic/grad_norm",
        "global norm of the critic's gradient before clipping",
        "steady, within a few times its median",
        "lower critic.optim.lr",
    ),
    Metric(
        "critic/update_skipped",
        "updates of the critic that were left out: the gradient is not finite",
        "0",
        "as for actor/update_skipped",
    ),
    Metric("critic/lr", "learning rate of the critic's last update"),
    Metric(
        "sft/loss",
        "mean loss of the tokens that are learned: their negative log-probability, "
        "nats, or with loss_type dft that weighted by the probability",
        "falls",
        "raise learner.optim.lr; look at what is learned: data.chat_template, "
        "data.max_length",
    ),
    Metric("sft/perplexity", "exp(mean negative log-probability)", "falls towards 1"),
    Metric(
        "sft/entropy",
        "mean entropy of the model's next token where one is learned, nats",
        "near the loss",
    ),
    Metric(
        "sft/mean_token_accuracy",
        "share of learned tokens that the model finds the most likely ones",
        "rises",
    ),
    Metric(
        "sft/grad_norm",
        "global norm of the gradient before learner.optim.clip_grad",
        "steady, within a few times its median",
        "lower learner.optim.lr",
    ),
    Metric(
        "sft/update_skipped",
        "1 if the update was left out because the gradient is not finite",
        "0",
        "as for actor/update_skipped",
    ),
    Metric("sft/lr", "learning rate of the step, by the schedule"),
    Metric(
        "reward/NAME/mean",
        "mean score of one reward function over the responses that it judges; or of a "
        "number beside the score, where it returns dictionaries",
        "rises",
    ),
    Metric(
        "reward_errors/NAME",
        "responses for which the function failed, with reward.on_error zero; logged "
        "where there are some",
        "absent",
        "set reward.on_error to raise to see the error",
    ),
    Metric(
        "response_length/{mean,max,min}",
        "tokens that the policy sampled; of an episode, in all its turns",
        "steady, or growing with the reward",
        "if it grows without the reward: reward.overlong_buffer, or Dr. GRPO "
        "(actor.loss_agg_mode seq-mean-token-sum-norm)",
    ),
    Metric(
        "response_length/clip_ratio",
        "share of responses that were cut off at rollout.max_response_length",
        "below 0.1",
        "raise rollout.max_response_length; give rollout.stop; see whether the chat "
        "template is the model's own",
    ),
    Metric(
        "prompt_length/{mean,max,min}", "tokens of the prompts, chat template included"
    ),
    Metric("agent/turns/{mean,max,min}", "turns of the policy in an episode"),
    Metric("agent/tool_calls", "tools called in an episode, on average"),
    Metric(
        "agent/forks",
        "how often an episode went on in a new context (agent.on_rewrite=fork), on "
        "average",
    ),
    Metric(
        "agent/observation_tokens",
        "tokens of an episode that were read between turns, on average",
    ),
    Metric(
        "agent/prefilled_tokens",
        "tokens of an episode that the engine computed besides those it sampled, on "
        "average; where it tells",
        "those of the first prompt and of observations, and a page a turn",
        "pages of a conversation are lost between its turns: raise rollout.cache_gib",
    ),
    Metric(
        "agent/environment_s/{mean,max}",
        "seconds of an episode that went to its environment's answers",
        "small beside timing_s/gen",
        "raise agent.workers; make the environment quicker",
    ),
    Metric(
        "agent/status/NAME",
        "share of episodes that ended so; see agent.on_status",
        "completed near 1",
        "max_tokens, context: raise agent.max_tokens; max_turns: raise "
        "agent.max_turns; env_error, tool_timeout: completions.jsonl tells why",
    ),
    Metric(
        "agent/failures/KIND",
        "how often that went wrong in the episodes of a step",
        "falls",
        "look at episodes where it did, in the report",
    ),
    Metric("agent/retries", "episodes that were begun anew, see agent.on_status"),
    Metric(
        "agent/masked",
        "share of episodes that nothing is learned from, see agent.on_status",
        "0",
        "their field why tells what broke",
    ),
    Metric(
        "rollout/kept_mass_{mean,min}",
        "probability, before top-k, top-p and min-p cut anything off, of the tokens "
        "that they left to draw from",
        "mean over 0.9",
        "the policy is trained on more than is sampled; loosen rollout.top_p, top_k or "
        "min_p",
    ),
    Metric(
        "rollout/probe_diff_{mean,max}",
        "|server - trainer| of log-probabilities on probe tokens after a transfer of "
        "weights, nats (vLLM)",
        "mean below rollout.vllm.max_probe_diff",
        "over it the run stops: the server holds other weights, or another dtype",
    ),
    Metric(
        "rollout/probe_followed",
        "slope of the server's change on the trainer's since the last transfer (vLLM)",
        "near 1",
        "far from it the run stops: the server did not take the new weights",
    ),
    Metric(
        "rollout/weights_{write,read,verify}_s",
        "seconds to write weights for the servers, to have them read, to probe (vLLM)",
        "small beside timing_s/step",
        "let rollout.vllm.weights_dir be in memory, such as /dev/shm",
    ),
    Metric(
        "rollout/adapters_mib",
        "MiB of adapters that are sent to the engine, in place of all weights "
        "(rollout.lora: separate); timing_s/update_weights is how long it takes",
    ),
    Metric(
        "mismatch/logprob_diff_{mean,max}",
        "|sampler - trainer| of a token's log-probability before the update, nats",
        "mean below rollout.max_mismatch (0.05); below 1e-4 in float32",
        "algorithm.rollout_correction.rollout_is: token; without rollout.quantization; "
        "rollout.dtype as actor.dtype",
    ),
    Metric(
        "mismatch/kl",
        "KL(sampler || trainer), estimator k3, nats per token",
        "below 0.01",
        "as for mismatch/logprob_diff_mean",
    ),
    Metric(
        "rollout_corr/{training,rollout}_ppl",
        "mean over sequences of exp(-mean log-probability): perplexity under trainer "
        "or sampler",
        "the two are near each other",
    ),
    Metric("rollout_corr/{training,rollout}_log_ppl", "the same before exp, nats"),
    Metric(
        "rollout_corr/kl",
        "KL(sampler || trainer), mean log-ratio, nats per token",
        "below 0.01",
        "as for mismatch/logprob_diff_mean",
    ),
    Metric(
        "rollout_corr/k3_kl",
        "KL(sampler || trainer), mean of ratio - 1 - log ratio",
        "below 0.01",
        "as for mismatch/logprob_diff_mean",
    ),
    Metric(
        "rollout_corr/log_ppl_{diff,abs_diff,diff_max,diff_min}",
        "trainer's log-perplexity less the sampler's, by sequence: mean, mean of the "
        "absolute value, extremes; nats",
        "near 0",
        "as for mismatch/logprob_diff_mean",
    ),
    Metric("rollout_corr/ppl_ratio", "mean of exp(log_ppl_diff)", "near 1"),
    Metric(
        "rollout_corr/chi2_{token,seq}",
        "mean of ratio^2, of tokens or whole sequences, less 1",
        "chi2_token below 0.1",
        "as for mismatch/logprob_diff_mean",
    ),
    Metric(
        "rollout_corr/rollout_is_{mean,max,min,std}",
        "importance weights after they were bounded, over tokens",
        "mean near 1",
        "another rollout_is_threshold, or rollout_is: token",
    ),
    Metric(
        "rollout_corr/rollout_is_eff_sample_size",
        "mean(weight)^2 / mean(weight^2): the share of tokens that count",
        "over 0.9",
        "another rollout_is_threshold, or rollout_is: token",
    ),
    Metric(
        "rollout_corr/rollout_is_ratio_fraction_{high,low}",
        "share of ratios over or below the bounds, before bounding",
        "below 0.05",
        "wider bounds, or less mismatch",
    ),
    Metric(
        "rollout_corr/rollout_is_oob_ratio",
        "share of ratios outside of LOWER_UPPER, whose weight is 0",
        "below 0.05",
        "wider bounds, or less mismatch",
    ),
    Metric(
        "rollout_corr/rollout_is_seq_"
        "{mean,std,max,min,max_deviation,fraction_high,fraction_low}",
        "the mean weight of each sequence: its distribution, how far it is from 1, and "
        "the share out of bounds before bounding",
        "mean near 1",
    ),
    Metric(
        "rollout_corr/rollout_rs_{masked_fraction,seq_masked_fraction}",
        "share of tokens, and of sequences in part, that all rejections left out",
        "below 0.1",
        "wider rollout_rs_threshold, or less mismatch",
    ),
    Metric(
        "rollout_corr/rollout_rs_KIND_"
        "{mean,std,max,min,fraction_high,fraction_low,masked_fraction,seq_mean,seq_std,"
        "seq_max,seq_min,seq_max_deviation,seq_fraction_high,seq_fraction_low,"
        "seq_masked_fraction}",
        "what the rejection KIND looks at, and how much of it is out of bounds",
        "masked_fraction below 0.1",
        "wider rollout_rs_threshold, or less mismatch",
    ),
    Metric("training/epoch", "how often the training questions have been gone through"),
    Metric(
        "rm/loss",
        "mean of -log sigmoid(chosen - rejected score - margin), nats, and "
        "center_rewards_coefficient * (chosen + rejected)^2",
        "falls from 0.69 (log 2)",
        "raise learner.optim.lr; look at the pairs: is the chosen answer better?",
    ),
    Metric(
        "rm/accuracy",
        "share of pairs whose chosen answer has the higher score",
        "rises, with that of held-out pairs",
        "if only this one rises: more pairs, fewer trainer.total_epochs, a lower "
        "learner.optim.lr",
    ),
    Metric("rm/margin", "mean of chosen - rejected score", "rises"),
    Metric(
        "rm/mean_reward",
        "mean score",
        "near 0",
        "set center_rewards_coefficient to 0.01",
    ),
    Metric("rm/{min_reward,max_reward}", "the lowest and the highest score"),
    Metric(
        "dpo/loss",
        "the losses of loss_type, each times its loss_weights, mean over pairs",
        "falls; sigmoid from 0.69 (log 2)",
        "raise learner.optim.lr, or lower beta",
    ),
    Metric("dpo/NAME_loss", "one of several losses, before its weight"),
    Metric(
        "dpo/entropy",
        "mean entropy of the policy's next token in both answers, nats",
        "falls slowly",
    ),
    Metric(
        "rewards/{chosen,rejected}",
        "mean of beta * log(policy / reference) of the whole answer",
        "the chosen one's above the rejected one's; both may fall",
        "if the chosen one's falls far: add sft to loss_type, lower learner.optim.lr",
    ),
    Metric(
        "rewards/accuracies",
        "share of pairs in which that of the chosen answer is higher; 0 before the "
        "first update, when both are 0",
        "rises, with that of held-out pairs",
        "as for rm/accuracy",
    ),
    Metric("rewards/margins", "mean of chosen - rejected", "rises"),
    Metric("logps/{chosen,rejected}", "mean log-probability of the whole answer, nats"),
    Metric(
        "rm/grad_norm",
        "global norm of the gradient before learner.optim.clip_grad",
        "steady, within a few times its median",
        "lower learner.optim.lr",
    ),
    Metric(
        "rm/update_skipped",
        "1 if the update was left out because the gradient is not finite",
        "0",
        "as for actor/update_skipped",
    ),
    Metric("rm/lr", "learning rate of the step, by the schedule"),
    Metric(
        "dpo/grad_norm",
        "global norm of the gradient before learner.optim.clip_grad",
        "steady, within a few times its median",
        "lower learner.optim.lr",
    ),
    Metric(
        "dpo/update_skipped",
        "1 if the update was left out because the gradient is not finite",
        "0",
        "as for actor/update_skipped",
    ),
    Metric("dpo/lr", "learning rate of the step, by the schedule"),
    Metric(
        "val-core/SOURCE/rm/{loss,accuracy,margin,mean_reward,min_reward,max_reward}",
        "the same as rm/accuracy and so on, of held-out pairs (data.val)",
        "as in training",
        "the best checkpoint by the accuracy is kept",
    ),
    Metric(
        "val-core/SOURCE/rewards/{accuracies,margins,chosen,rejected}",
        "the same as rewards/accuracies and so on, of held-out pairs (data.val)",
        "as in training",
        "the best checkpoint by the accuracy is kept",
    ),
    Metric(
        "val-core/SOURCE/{logps/chosen,logps/rejected,dpo/loss,dpo/NAME_loss,"
        "dpo/entropy}",
        "the same as logps/chosen and so on, of held-out pairs (data.val)",
    ),
    Metric("training/learned_tokens", "tokens that the step learned (jaxrl sft)"),
    Metric(
        "training/groups_all_equal",
        "share of prompts whose responses all got the same reward",
        "below 0.8; such prompts teach an estimator that compares a group nothing",
        "questions nearer to what the model can do, a higher rollout.n or "
        "rollout.temperature, algorithm.filter_groups",
    ),
    Metric(
        "training/groups_generated",
        "prompts that were answered for the step (algorithm.filter_groups)",
    ),
    Metric(
        "training/groups_kept",
        "prompts whose responses differ, which are trained on",
        "a third or more of those generated",
        "as for training/groups_all_equal",
    ),
    Metric(
        "training/truncated_completions_masked",
        "responses that were cut off and are in no loss "
        "(algorithm.mask_truncated_completions)",
        "few",
        "as for response_length/clip_ratio",
    ),
    Metric(
        "val-core/SOURCE/sft/{loss,perplexity,entropy,mean_token_accuracy}",
        "the same as sft/loss and so on, of held-out rows (data.val)",
        "falls, or rises, with that of training",
        "if the loss rises again: fewer trainer.total_epochs, a lower "
        "learner.optim.lr; the best checkpoint by it is kept",
    ),
    Metric(
        "val-core/SOURCE/acc/mean@N",
        "share of correct answers, N sampled to each held-out question",
        "rises, beyond its interval",
        "see the troubleshooting page: the reward does not rise",
    ),
    Metric(
        "val-core/SOURCE/acc/greedy",
        "share of correct answers, each question answered greedily",
        "rises, beyond its interval",
    ),
    Metric(
        "val-core/SOURCE/acc/{mean@N,greedy}/{ci95_low,ci95_high}",
        "ends of the 95 % interval: Wilson's, with an effective number of answers",
        "narrow beside what should be seen",
        "more held-out questions (data.val.size)",
    ),
    Metric(
        "val-core/SOURCE/acc/best@K/mean",
        "pass@K: the chance that one of K answers is correct, unbiased",
        "does not fall while mean@N rises",
        "if it falls, the policy only sharpens: see actor/entropy",
    ),
    Metric(
        "val-core/SOURCE/reward/mean@N",
        "mean total reward of the sampled answers to held-out questions",
        "rises with critic/rewards/mean",
        "if only critic/rewards/mean rises: more, or more varied, training questions",
    ),
    Metric(
        "val-aux/SOURCE/NAME/mean@N",
        "mean score of one reward function on held-out questions",
    ),
    Metric(
        "val-aux/agent/NAME",
        "as agent/NAME, of the sampled episodes; questions with a masked one are in no "
        "other metric of the validation",
    ),
    Metric("val-aux/response_length/mean", "tokens of a sampled answer"),
    Metric(
        "val-aux/response_length/clip_ratio",
        "share of sampled answers that were cut off",
        "below 0.1",
        "as for response_length/clip_ratio",
    ),
    Metric("perf/total_num_tokens", "tokens of prompts and responses in the step"),
    Metric("perf/time_per_step", "seconds of the step"),
    Metric(
        "perf/throughput",
        "total_num_tokens / time_per_step / devices, tokens/s",
        "steady",
        "timing_s says which phase grew",
    ),
    Metric("perf/rollout_tokens_per_s", "new tokens / timing_s/gen"),
    Metric("perf/update_tokens_per_s", "trained tokens / timing_s/update_actor"),
    Metric(
        "perf/mfu/actor",
        "operations of the update / its seconds / peak of the devices; where the peak "
        "is known",
        "0.4 or more for models from 1.5B on",
        "actor.pack_length, a larger actor.micro_batch_size, actor.remat dots",
    ),
    Metric(
        "perf/token_efficiency",
        "share of real tokens among those that the update computes",
        "over 0.8",
        "set actor.pack_length",
    ),
    Metric(
        "perf/compilations",
        "programs compiled, or read from XLA's cache, within the step",
        "0 after the first step",
        "fixed rollout and packing sizes; a reward function that uses JAX",
    ),
    Metric(
        "perf/max_cpu_memory_gb",
        "most memory of this process on the host so far, GiB",
        "levels off",
        "a reward function, or a logger, that keeps what it gets",
    ),
    Metric(
        "perf/max_memory_allocated_gb",
        "most memory in use so far on the device that used most, GiB; where devices "
        "count it",
        "below what the device has",
        "actor.micro_batch_size, rollout.cache_gib",
    ),
    Metric("timing_s/step", "the whole step"),
    Metric("timing_s/gen", "generation, without the phases below"),
    Metric("timing_s/reward", "reward functions and the reward model"),
    Metric(
        "timing_s/old_log_prob", "log-probabilities of the policy and the reference"
    ),
    Metric("timing_s/teacher", "the teacher's log-probabilities, before the update"),
    Metric("timing_s/values", "the critic's values"),
    Metric("timing_s/adv", "advantages and packing"),
    Metric("timing_s/update_critic", "the critic's update"),
    Metric("timing_s/update_actor", "the policy's update"),
    Metric("timing_s/update_weights", "weights on their way to the engine"),
    Metric("timing_s/testing", "validation"),
    Metric("timing_s/save_checkpoint", "what of saving a checkpoint holds up the run"),
    Metric(
        "timing_s/compile", "compilation, wherever it happens; no part of the others"
    ),
)

_FREE = re.compile(r"\{(.+?)\}|(?<![A-Z])(NAME|SOURCE|KIND|N|K)(?![A-Z])|(.)")


def _pattern(name: str) -> re.Pattern[str]:
    """What the logged names of one row look like."""

    def part(found: re.Match[str]) -> str:
        choices, word, plain = found.groups()
        if choices:
            return f"({'|'.join(_pattern(c).pattern for c in choices.split(','))})"
        if word:
            return r"\d+" if word in ("N", "K") else ".+"
        return re.escape(plain)

    return re.compile(_FREE.sub(part, name))


_PATTERNS = tuple(_pattern(metric.name) for metric in METRICS)
