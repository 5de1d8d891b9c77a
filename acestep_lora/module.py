"""The training step: what is learnt, and how it is measured."""

import logging
import math
from collections.abc import Callable
from functools import cached_property

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from acestep_lora import adapters, basemodel, flow, numerics
from acestep_lora.adapters import Adapter
from acestep_lora.conditioning import hint_context, silence_context
from acestep_lora.data.items import VAL_TIMESTEPS, Batch
from acestep_lora.dit import AceStepDiT, load_dit
from acestep_lora.errors import UserError
from acestep_lora.numerics import Guard
from acestep_lora.quantize import check as check_quantize
from acestep_lora.quantize import quantize as pack
from acestep_lora.quantize import weight_of
from acestep_lora.randomness import key
from acestep_lora.sharding import FSDP2, local, whole

log = logging.getLogger(__name__)


def check_optimizer(make: Callable[..., Optimizer]) -> None:
    """Raise UserError for options that an optimizer refuses, before there is anything to optimise."""
    try:
        make([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(f"optimizer: {error}.") from None


class FlowModule(L.LightningModule):
    """A frozen DiT with a trainable adapter, learning the velocity of the flow from noise to music.

    Args:
        base: where the base model is; its weights are read in `configure_model`, after preprocessing is done.
        optimizer: partial that takes parameters; scheduler: partial that takes (optimizer, total_steps), or None.
        dtype: of the frozen weights. Adapter and optimizer states are float32 whatever it is.
        recompute: how many layers drop their activations and compute them again in the backward pass.
        attention: how the sliding layers compute, one of `attention.KINDS`; compile: compile each layer.
        quantize: how the frozen weights are kept, one of `quantize.KINDS`.
        preservation: weight of `drift` in what is minimised.
        spike, max_skipped: see numerics.Guard.
    """

    strict_loading = False  # checkpoints hold what is trained; the base model's weights come from the base model

    def __init__(
        self,
        base: basemodel.BaseModel,
        adapter: Adapter,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        dtype: torch.dtype = torch.float32,
        recompute: int = 0,
        attention: str = "auto",
        compile: bool = False,
        quantize: str = "none",
        seed: int = 42,
        grad_norms_every_n_steps: int = 100,
        preservation: float | None = None,
        spike: float | None = 10.0,
        max_skipped: int = 10,
    ) -> None:
        super().__init__()
        check_quantize(quantize, adapter)
        check_optimizer(optimizer)
        self.guard = Guard(spike, max_skipped)
        self.base, self.adapter, self.dtype_frozen, self.quantize = base, adapter, dtype, quantize
        self.recompute, self.attention, self.compiled = recompute, attention, compile
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.grad_norms_every_n_steps, self.seed = grad_norms_every_n_steps, seed
        self.preservation = preservation or 0.0
        self.dit = None
        self.base_losses: Tensor | None = None
        self._loss = torch.zeros(3)  # sums of losses, drifts and items since the last logged step, of all ranks
        self._window = torch.zeros(3)  # the same of the optimizer step in progress, of this rank

    # ------------------------------------------------------------ model

    def setup(self, stage: str) -> None:
        if self.steps_per_epoch() < 1:
            limit = self.trainer.limit_train_batches
            raise UserError(f"trainer.limit_train_batches={limit} leaves nothing of an epoch to train on.")

    def configure_model(self) -> None:
        if self.dit is not None:
            return
        self.load(self.trainer.strategy.root_device)
        if isinstance(self.trainer.strategy, FSDP2):
            self.trainer.strategy.shard(self.dit, self.dit.layers)

    def load(self, device: torch.device) -> None:
        """Read the base model's weights and put the adapter onto them; what is to be packed is packed on `device`."""
        dit = load_dit(self.base.dit, dtype=self.dtype_frozen)
        if self.quantize != "none":
            pack(dit, self.quantize, device)
        self.take(dit, *basemodel.constants(self.base))

    def take(self, dit: AceStepDiT, null: Tensor, silence: Tensor) -> None:
        """Make a frozen transformer trainable. null [d]: the condition of unconditional training; silence [s, c]."""
        self.register_buffer("null", null, persistent=False)
        self.register_buffer("silence", silence, persistent=False)
        dit.recompute, dit.kernel = frozenset(range(self.recompute)), self.attention
        torch.manual_seed(key(self.seed, "adapter"))  # not after whatever preprocessing happened to draw
        self.adapter.inject(dit)
        adapters.cast_by_autocast(dit, self.dtype_frozen != torch.float32)
        for layer in dit.layers if self.compiled else ():
            layer.compile(dynamic=True)
        self.dit = dit.train()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        trained = self.trainable()
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["base_losses"] = self.base_losses
        checkpoint["guard"], checkpoint["loss"] = self.guard.state.cpu(), self._loss.cpu()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Refuse weights of another adapter; Lightning itself would load what fits and say nothing."""
        wrong = sorted(checkpoint["state_dict"].keys() ^ self.trainable().keys())
        if wrong:
            raise adapters.AdapterError(f"The checkpoint holds another adapter: {wrong[0]} has no counterpart.")
        self.base_losses = checkpoint["base_losses"]
        self.guard.state, self._loss = checkpoint["guard"], checkpoint["loss"]

    def configure_optimizers(self) -> dict | Optimizer:
        optimizer = self.make_optimizer(list(self.trainable().values()))
        # A fused optimizer would unscale float16 gradients inside its step, which is after they are clipped.
        optimizer._step_supports_amp_scaling = False
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def steps_per_epoch(self) -> int:
        """Trainer.estimated_stepping_batches would start the loader before a resumed run has restored its position."""
        trainer = self.trainer
        batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return math.ceil(batches / trainer.accumulate_grad_batches)

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, under max_epochs, max_steps or both."""
        trainer = self.trainer
        totals = [trainer.max_steps if trainer.max_steps != -1 else None]
        totals += [trainer.max_epochs * self.steps_per_epoch() if trainer.max_epochs not in (None, -1) else None]
        return min((total for total in totals if total is not None), default=10**9)

    # ------------------------------------------------------------ steps

    def losses(self, batch: Batch) -> Tensor:
        """The flow-matching loss of each item [b]."""
        x_t = flow.noisy(batch.latents, batch.noise, batch.t)
        context = silence_context(self.silence, batch.latents.shape[1]).expand(len(batch.t), -1, -1)
        if batch.hints is not None:
            context = torch.where(batch.hinted.view(-1, 1, 1), hint_context(batch.hints), context)
        null = self.null.to(batch.condition.dtype)
        condition = torch.where(batch.dropped.view(-1, 1, 1), null, batch.condition)
        v = self.dit(x_t, batch.t, condition, context, batch.condition_mask, batch.frame_mask)
        return flow.item_losses(v, flow.velocity(batch.latents, batch.noise), batch.frames)

    def drift(self, batch: Batch) -> Tensor:
        """How far the adapter moves the velocity at each item under another prompt, mean squared [b]; 0 without one.

        The frozen model itself is the target, so nothing needs to be generated to preserve what it knows.
        """
        if batch.prior is None:
            return torch.zeros_like(batch.t)
        x_t = flow.noisy(batch.latents, batch.noise, batch.t)
        context = silence_context(self.silence, x_t.shape[1]).expand(len(x_t), -1, -1)
        inputs = x_t, batch.t, batch.prior, context, batch.prior_mask, batch.frame_mask
        with torch.no_grad(), adapters.disabled(self.dit):
            target = self.dit(*inputs)
        return flow.item_losses(self.dit(*inputs), target, batch.frames)

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What is minimised, and of it the flow-matching loss and the drift, each [b]."""
        losses, drift = self.losses(batch), self.drift(batch)
        return losses + self.preservation * drift, losses.detach(), drift.detach()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.adapter.dropout:
            torch.manual_seed(batch.key)  # dropout masks, too, are a function of the step
        objective, losses, drift = (each * batch.weight for each in self.objective(batch))
        self.guard.see(objective.detach(), batch.tracks)
        self._window.add_(torch.stack([losses.sum(), drift.sum(), batch.weight.sum()]))
        # Lightning divides by the accumulation count and DDP by the world size. Undone here, the gradient of an
        # optimizer step is the mean over its items, also when the last window of an epoch is a partial one.
        accumulate, world = self.trainer.accumulate_grad_batches, self.trainer.world_size
        return objective.sum() * (accumulate * world / batch.window)

    def on_train_start(self) -> None:
        self._loss, self._window = self._loss.to(self.device), self._window.to(self.device)
        self.guard.state = self.guard.state.to(self.device)
        self._logged_step = self.global_step

    def on_train_batch_end(self, outputs, batch: Batch, batch_idx: int) -> None:
        if self.global_step == self._logged_step:
            return  # inside an accumulation window
        self._logged_step = self.global_step
        self.log("train/skipped_steps", self.guard.skipped)
        self.log("lr", self._lr)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            loss, drift, items = self._loss
            self.log("train/loss", loss / items, prog_bar=True)
            if batch.prior is not None:
                self.log("train/prior_loss", drift / items)
            self.guard.report(self.global_step)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # of this step, before the schedule moves on

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.trainable().values(), gradient_clip_val or float("inf"))
        norm = whole(norm)
        self.log("train/grad_norm", norm)
        if self.grad_norms_every_n_steps and (self.global_step + 1) % self.grad_norms_every_n_steps == 0:
            self.log_dict(self._block_norms())
        self._skip_or_take(optimizer, norm)

    def _skip_or_take(self, optimizer: Optimizer, norm: Tensor) -> None:
        window = self.trainer.strategy.reduce(self._window, reduce_op="sum").clone()
        self._window.zero_()
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        bad = self.guard.judge(norm, window[0] / window[2], scaled)
        numerics.skip(optimizer, bad)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self._loss.zero_()  # logged with the step before
        self._loss.add_(window.masked_fill(bad, 0.0))

    def check_finite(self) -> None:
        """Raise NumericError if what is trained is not finite: such weights are worth nothing, and are not saved."""
        finite = torch.stack([local(parameter).isfinite().all() for parameter in self.trainable().values()]).all()
        if not self.trainer.strategy.reduce_boolean_decision(bool(finite), all=True):
            raise numerics.NumericError(
                f"After step {self.global_step} the trained weights are no longer finite, and are not saved: "
                "resume=auto goes back to the last checkpoint; a lower optimizer.lr keeps them finite in a new run."
            )

    def _block_norms(self) -> dict[str, Tensor]:
        """Gradient norm of each block, still on the device: one kernel for all parameters, no synchronisation."""
        trained = {name: parameter.grad for name, parameter in self.trainable().items() if parameter.grad is not None}
        blocks: dict[str, list[int]] = {}
        for i, name in enumerate(trained):
            blocks.setdefault(".".join(name.split(".")[1:3]), []).append(i)
        norms = torch.stack([whole(norm) for norm in torch._foreach_norm(list(trained.values()))])
        return {f"grad_norm/{block}": norms[indices].norm() for block, indices in blocks.items()}

    # ------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        # [adapted, base or drift; held out or trained on; level; sum or items]
        self._sums = torch.zeros(3, 2, len(VAL_TIMESTEPS), 2, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._add(0, batch, self.losses(batch))
        if self.base_losses is None and self.adapter.config is not None:
            with adapters.disabled(self.dit):
                self._add(1, batch, self.losses(batch))
        if batch.prior is not None and int(batch.level.min()) < len(VAL_TIMESTEPS):  # of held-out songs
            self._add(2, batch, self.drift(batch))

    def _add(self, which: int, batch: Batch, losses: Tensor) -> None:
        sums, items = self._sums[which].view(-1, 2).unbind(1)
        sums.index_add_(0, batch.level, losses * batch.weight)
        items.index_add_(0, batch.level, batch.weight)

    def on_validation_epoch_end(self) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        if self.trainer.sanity_checking:
            return
        (losses, seen), base, (drift, _) = sums[..., 0] / sums[..., 1]
        self.log("val/loss", losses.mean(), prog_bar=True)
        if self.adapter.config is not None:
            self.base_losses = base.cpu() if self.base_losses is None else self.base_losses
            base, seen_base = self.base_losses
            self.log("val/base_loss", base.mean())
            self.log_dict({f"val/base_loss_t={t}": loss for t, loss in zip(VAL_TIMESTEPS, base, strict=True)})
            if seen_base.isfinite().all():
                self.log("train/grid_base_loss", seen_base.mean())
        if seen.isfinite().all():
            self.log("train/grid_loss", seen.mean())
        if drift.isfinite().all():
            self.log("val/prior_loss", drift.mean())
        self.log_dict({f"val/loss_t={t}": loss for t, loss in zip(VAL_TIMESTEPS, losses, strict=True)})

    # ------------------------------------------------------------ results

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's tensors, whole; every rank has to call it."""
        return {name: whole(tensor) for name, tensor in adapters.state(self.dit).items()}

    def base_weight(self, module: str) -> Tensor:
        """The frozen weight under an adapted module, named in diffusers' terms."""
        shared = isinstance(self.trainer.strategy, FSDP2)  # then it is read anew: only the first rank asks
        layer = (self._unshared if shared else self.dit).get_submodule(module)
        return weight_of(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer)

    @cached_property
    def _unshared(self) -> AceStepDiT:
        return load_dit(self.base.dit, self.dtype_frozen)
