"""Flags by the names that they have elsewhere: those that mean the same are taken, the others named.

docs/COMING_FROM.md tells at length what this says in a line. A name is looked up without its dashes, with `_`
for `-`, and without the section in front of it. Keys of a config file get the same hints, in the words of the
file; none is taken by another name, since a file is read again later. Version 0.2 (2026-11).
"""
from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

# Short flag -> section.field. All other fields have their long flag alone.
IN_TRAIN = ("out", "init", "amp", "accum", "batch", "steps", "epochs", "seed", "device", "compile")
SHORT_FLAGS = {"--data": "data.path", "--patch": "data.patch", "--workers": "data.workers"}
SHORT_FLAGS |= {f"--{name}": f"train.{name}" for name in IN_TRAIN}
# Ours -> what others call the same, with the same values.
SAME = {
    "--optim.lr": "lr learning_rate l",
    "--optim.weight_decay": "wd",
    "--batch": "batch_size b train_batch_size batch_size_per_gpu micro_batch_size",
    "--accum": "gradient_accumulation_steps grad_accum accumulate_grad_batches accum_steps",
    "--epochs": "epoch n_epochs num_epochs max_epochs max_epoch vae_epochs e",
    "--steps": "max_steps num_steps max_iters max_iterations",
    "--vae.z_channels": "latent_channels latent_dim embed_dim",
    "--vae.num_codes": "num_embeddings codebook_size n_embed",
    "--data": "data_dir dataset_dir data_path data_root",
    "--out": "output_dir out_dir output_path model_dir save_dir vae_save_dir",
    "--workers": "num_workers n_workers",
    "--seed": "random_seed training_seed manual_seed",
    "--amp": "use_amp",
    "--train.ema": "ema_rate ema_decay",
    "--optim.grad_clip": "max_grad_norm gradient_clipping clip_grad_norm",
    "--dry-run": "tryrun",
}
# What to do instead, and under which names it is asked for.
INSTEAD = {
    "--vae.base_channels 64 --vae.channel_mult 1,2,4 is their 64,128,256; or --unet.channels 64,128,256":
        "num_channels channels model_channels base_channels features",
    "always 3; 2D, by slices: --task seg --preset unet2d": "spatial_dims dims ndim",
    "--device cuda:0": "gpu gpu_id gpu_ids cuda",
    "torchrun --nproc_per_node 4 train.py ... for many GPUs":
        "gpus num_gpus n_gpus devices ngpu num_nodes nnodes node_rank master_addr master_port world_size "
        "local_rank nproc_per_node",
    "--patch D,H,W, z first; --patch 96 is a cube":
        "patch_size roi_size crop_size image_size img_size input_size resolution volume_size val_patch_size",
    "channels come from the data": "in_channels out_channels n_channels input_channels",
    "classes are counted in the labels; --data.classes 3 fixes them": "num_classes n_classes c",
    "--resume RUN goes on with a run, --init FILE starts from its weights":
        "ckpt checkpoint load load_dir pretrained pretrained_vae_path finetune_ckpt ckpt_path f vae_ckpt "
        "trained_autoencoder_path",
    "--task vae, seg or features, and --preset NAME":
        "model mode arch network model_name vae_type config_type",
    "--amp (bf16 where the device has it); for 16-bit weights --train.precision master16":
        "fp16 bf16 half use_fp16 use_bf16 fp16_mode precision mixed_precision",
    "--optim.schedule cosine, constant, plateau ..., --optim.warmup 0.05":
        "lr_scheduler scheduler lr_schedule lr_policy warmup_steps warmup_epochs warmup",
    "--memory.mode checkpoint, or tile for volumes that do not fit":
        "use_checkpoint use_checkpointing grad_checkpoint gradient_checkpointing num_splits save_mem "
        "chunk_size",
    "--train.val_every 50, in steps": "val_interval eval_every eval_interval val_freq validation_epochs",
    "--train.save_every 50, in steps": "save_interval checkpoint_every i_save save_freq",
    "--log.every 10, in steps": "log_interval print_freq i_print log_every",
    "--log.sample_every 100, in steps": "sample_interval i_sample save_samples",
    "--data.val_fraction 0.2, a share; --data.fold 0/5": "validation train_split val_split val_ratio v",
    "volumes are memory maps; --data.cache_dir FOLDER says where":
        "cache_rate cache cache_num cache_data use_persistent_dataset",
    "--data.flip DHW --data.turn HW, --data.gamma, --data.noise, --data.blur, --data.bias_field":
        "random_aug augment augmentation use_augmentation aug data_aug",
    "--loss.recon l1, mse, l1_l2 ...": "loss recon_loss loss_type reconstruction_loss",
    "--loss.kl_weight; a mean over latents here, so a sum's weight times their number":
        "kl_weight lambda_kl kl beta kl_loss_weight",
    "--unet.upsampling interpolate": "bilinear",
    "--vae.norm group --vae.norm_groups 32": "norm norm_num_groups num_groups",
    "out of memory is repeated at once (--memory.recover), and --resume RUN goes on": "auto_retry",
    "--log.wandb": "wandb_project_name use_wandb",
    "--log.tensorboard": "tensorboard_dir tfevent_path use_tensorboard",
}


def by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: ours for ours, names in table.items() for name in names.split()}


ALIASES, HINTS = by_name(SAME), by_name(INSTEAD)


def bare(flag: str) -> str:
    """`--optim.learning-rate=1` -> learning_rate."""
    return flag.split("=")[0].lstrip("-").rpartition(".")[2].replace("-", "_").lower()


def spelled(words: Sequence[str], known: Collection[str]) -> list[str]:
    """A command line with flags of ALIASES by our names, where they have no section and are not ours.

    known: the flags that there are; a name whose own flag is not among them stays as it is.
    """
    result = []
    for word in words:
        flag, equals, value = word.partition("=")
        ours = ALIASES.get(bare(flag))
        is_foreign = flag.startswith("-") and "." not in flag and flag not in known
        # -b is short for batch, but --b is nothing.
        is_short = len(bare(flag)) == 1
        if is_foreign and ours in known and is_short == (not flag.startswith("--")):
            word = f"{ours}{equals}{value}"
        result.append(word)
    return result


def named_in(text: str) -> list[str]:
    """The flags of a text."""
    return re.findall(r"--[a-z][\w.-]*\w", text)


def advice(flag: str, known: Collection[str]) -> str:
    """The end of an error about an unknown flag: what to use instead, else where all flags stand.

    A hint is given where one of its flags is known: those of train.py are no help to predict.py.
    """
    name = bare(flag)
    fields = [ours for ours in known if bare(ours) == name]
    hint = HINTS.get(name, "")
    if hint and ("--train.seed" in known or set(named_in(hint)) & set(known)):
        return f"; here: {hint}"
    if fields:
        return f"; did you mean {' or '.join(fields)}?"
    if ALIASES.get(name) in known:
        return f"; did you mean {ALIASES[name]}?"
    # Letters in common: of whole names, so that a long section does not make two names alike.
    names = {bare(ours): ours for ours in known}
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {names[near[0]]}?"
    return "; --help has the everyday flags, --help-all the others"


# -------------------------------------------------------------------------------- keys of a config file

def key_of(flag: str) -> str:
    """The key that a flag is in a file: data.patch of --patch, vae.z_channels of --vae.z_channels."""
    return SHORT_FLAGS.get(flag, flag.removeprefix("--"))


def in_file(text: str) -> str:
    """A hint with `key: value` for its flags, but for those that are about the command alone."""
    def key(found: re.Match) -> str:
        flag, value = found[1], found[2]
        if "." not in flag and flag not in SHORT_FLAGS and flag not in ("--task", "--preset"):
            return found[0]
        return f"{key_of(flag)}: {value}" if value else key_of(flag)
    # Flags one after the other are a command; keys stand apart.
    text = re.sub(r"(--[a-z][\w.-]* [\w.,]*\w) (?=--)", r"\1, ", text)
    return re.sub(r"(--[a-z][\w.-]*\w)(?: (?=[\w])(?!or )(\S*\w))?", key, text)


def key_advice(name: str, section: str, sections: Mapping[str, Collection[str]],
               others: Collection[str] = ()) -> str:
    """The end of an error about an unknown key of a file: what to write instead, else what there is.

    section: where the key stands; "" at the top of the file. sections: section -> its fields. others: what
    may stand at the top besides sections.
    """
    # First what the flag of that name would be told: a hint, a field of that name elsewhere, our name for it.
    word = name.replace("-", "_").lower()
    if word in HINTS:
        return f"; here: {in_file(HINTS[word])}"
    places = [f"{other}.{word}" for other, fields in sections.items() if word in fields and other != section]
    if places:
        return f"; did you mean {' or '.join(places)}?"
    if word in ALIASES:
        return f"; did you mean {key_of(ALIASES[word])}?"
    # Then the name that is most like it of its own section, else all of that section.
    known = sections[section] if section else [*others, *sections]
    return closest(name, known, f"{section}." if section else "")


def closest(word: str, words: Collection[str], prefix: str = "") -> str:
    """The end of an error about an unknown word: the known one that is most like it, else all of them."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    known = ", ".join(map(str, words))
    if len(known) > 300:
        known = known[:300].rpartition(", ")[0] + ", ..."
    return f"; known: {known}"
