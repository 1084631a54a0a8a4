"""What a line of metrics.jsonl can hold beside diagnostics. One line is one step."""

from scaling_testbed.diagnostics.names import Metric

STEP_METRICS = (
    Metric("step", "Updates made so far. Step 0 is the initial model.", "steps"),
    Metric("tokens", "Training tokens seen so far.", "tokens"),
    Metric("train_loss", "Cross-entropy of this step's global batch, before the update.", "nats per token"),
    Metric("train_z_loss", "Mean of the z-loss of this step's batch, with its coefficient.", "nats per token"),
    Metric(
        "train_objective",
        "The objective of this step's batch, without the z-loss; absent where it is the cross-entropy.",
        "per token",
    ),
    Metric("lr", "The learning rate of this update, before factors of tensors."),
    Metric("grad_norm", "Global norm of the gradient, before clipping."),
    Metric("clip_coefficient", "What the gradient was multiplied by; 1 where it was not clipped."),
    Metric("skipped", "true where the update was left out, as optimizer.skip_spikes_sigmas does; else absent."),
    Metric("tokens_per_second", "Training tokens in a second, from the second step of this start on.", "tokens/s"),
    Metric("ms_per_step", "Mean time of the updates since the last line, without evaluations.", "milliseconds"),
    Metric(
        "mfu",
        "Model FLOPs utilisation, from tokens_per_second: FLOPs in a second divided by the peak of all devices; null "
        "where the peak is unknown.",
    ),
    Metric(
        "peak_memory_bytes",
        "Largest memory of the first process so far: allocated on its GPU, or resident on a CPU.",
        "bytes",
    ),
    Metric("seconds", "Time of training and evaluation so far, over all starts.", "seconds"),
    Metric("val_loss", "Cross-entropy of the validation split, without z-loss.", "nats per token"),
    Metric(
        "val_bpb",
        "val_loss for each byte of text; null where the data are no text, the tokenizer loses text, or some tokens are "
        "no targets.",
        "bits per byte",
    ),
    Metric("val_loss_by_set", "Name of each validation set -> its loss, that of the run included.", "nats per token"),
    Metric(
        "weights_by_source",
        "Name of each source -> its weight from this step on, as data.online chose it; absent without data.online.",
    ),
    Metric("val_loss_average", "val_loss with the average of the weights; absent without one.", "nats per token"),
    Metric("val_loss_average_by_set", "val_loss_by_set with the average of the weights.", "nats per token"),
    Metric(
        "ce_scaled",
        "Cross-entropy of the odd windows of the validation split, counted from 0, after one temperature that is "
        "fitted on the even ones: with evaluation.ce_scaled=true, or where the objective is no cross-entropy. null "
        "where it is not finite, or there is one window.",
        "nats per token",
    ),
    Metric("ce_scaled_temperature", "This temperature, from 1/8 to 8: the logits are divided by it."),
    Metric("ce_scaled_by_set", "Name of each validation set -> its ce_scaled.", "nats per token"),
    Metric("ce_scaled_average", "ce_scaled with the average of the weights; absent without one.", "nats per token"),
    Metric(
        "accuracy_by_group",
        "Name of each group of targets that the data tell apart -> the share of them that are the likeliest token.",
    ),
    Metric("error_by_task", "Name of each of evaluation.tasks -> its top-1 error, where the tasks were scored."),
)
