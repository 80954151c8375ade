"""Do the tests find what goes wrong? Breaks the code in many ways, one at a time, and tells which no test finds.

    python tools/faults.py               all, in a scratch copy of this checkout; about four minutes on one CPU core
    python tools/faults.py -k moco       those with this word in their file, their words or their tests
    python tools/faults.py --list        what would be broken

A fault is a few words, a piece of text that stands once in its file (or in the files of its folder), what stands there
instead, and the tests that should find it, as pytest wants them: "moco loop -k queue" are those of test_moco.py and
test_loop.py with this word. Exit status 1 where a fault survives, or where its text is not there any more.
"""

import argparse
import compileall
import importlib
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WARM = "numpy", "PIL.Image", "torch._dynamo", "torch.utils.flop_counter"    # imported once, not in each child
FAULTS = {                                                                  # file or folder: its faults
    "medssl/simclr.py": [
        ("the temperature inverted", "z @ z.T / temperature", "z @ z.T * temperature", "losses -k nt_xent"),
        ("each view is its own negative",
         "similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)",
         "similarity.clone()", "losses -k nt_xent"),
        ("the neighbour for a partner", ".roll(len(z1))", ".roll(1)", "losses -k nt_xent"),
        ("rows not of length one", "z = F.normalize(z, dim=1)", "z = F.normalize(z, dim=0)", "losses -k nt_xent"),
        ("one view twice", "return self.augment(images), self.augment(images)", "return (self.augment(images),) * 2",
         "contract -k simclr"),
        ("negatives of the own process only", "z1_all, z2_all = all_ranks(z1), all_ranks(z2)",
         "z1_all, z2_all = z1, z2", "two_processes -k simclr"),
        ("gathered gradients not scaled", "x + (len(rows) - 1) * (x - x.detach())", "x", "two_processes -k simclr"),
        ("half precision stays", "torch.cat(at_least_float32(z1, z2))", "torch.cat([z1, z2])", "losses -k half"),
        ("chance counts the view itself", "2 * len(z1_all) - 1", "2 * len(z1_all)", "losses -k chance"),
    ],
    "medssl/dcl.py": [
        ("the positive in the denominator", "same_image, -math.inf",
         "same_image & (torch.arange(2)[:, None] < 1), -math.inf", "losses -k dcl"),
        ("a gradient through the weight", "positive.detach() / sigma", "positive / sigma", "losses -k dclw"),
        ("the sign of the weight", "2 - len(z1) *", "2 + len(z1) *", "losses -k dclw"),
        ("one direction twice", "decoupled_loss(z2_all, z1_all,", "decoupled_loss(z1_all, z2_all,",
         "losses -k both_views"),
    ],
    "medssl/simsiam.py": [
        ("no stop of the gradient", "(p1, z2.detach())", "(p1, z2)", "losses -k simsiam"),
        ("no predictor", "p1, p2 = self.predictor(z1), self.predictor(z2)", "p1, p2 = z1, z2", "contract -k simsiam"),
        ("each view against itself", "(p1, z2.detach()) + negative_cosine(p2, z1.detach())",
         "(p1, z1.detach()) + negative_cosine(p2, z2.detach())", "losses -k simsiam"),
        ("towards the opposite", "return -F.cosine_similarity", "return F.cosine_similarity", "losses -k simsiam"),
    ],
    "medssl/byol.py": [
        ("momentum the wrong way round", "old.lerp_(new, 1 - momentum)", "old.lerp_(new, momentum)", "losses -k byol"),
        ("a target that gradients train", "copy.deepcopy(self.encoder).requires_grad_(False)",
         "copy.deepcopy(self.encoder)", "contract losses -k byol"),
        ("a target's projector that stays", "        ema_update(self.target_projector, self.projector, momentum)\n", "",
         "losses -k byol"),
        ("the average in forward", "        loss = cosine_distance(",
         "        ema_update(self.target_encoder, self.encoder, 0.5)\n        loss = cosine_distance(",
         "contract -k byol"),
        ("each view against itself", "(p1, target2) + cosine_distance(p2, target1)",
         "(p1, target1) + cosine_distance(p2, target2)", "losses -k byol"),
        ("the schedule backwards", "return end - (end - start)", "return start + (end - start)", "losses -k byol"),
        ("the other encoder exported", 'if self.export == "online"', 'if self.export == "target"', "losses -k byol"),
        ("BatchNorm's statistics averaged too", "zip(slow.parameters(), fast.parameters())",
         "zip(*([*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())] for net in (slow, fast)))",
         "losses -k byol"),
    ],
    "medssl/vicreg.py": [
        ("variance for deviation", "(cov.diagonal() + 1e-4).sqrt()", "(cov.diagonal() + 1e-4)", "losses -k vicreg"),
        ("variances in the covariance term", "cov.masked_fill(same, 0)", "cov", "losses -k vicreg"),
        ("divided by B", "(len(z) - 1)", "len(z)", "losses -k vicreg"),
        ("centred over the wrong axis", "z - z.mean(0)", "z - z.mean(1, keepdim=True)", "losses -k vicreg"),
        ("the hinge turned round", "F.relu(1 - (cov", "F.relu(-1 + (cov", "losses -k vicreg"),
        ("terms of the own process only", "vicreg_terms(all_ranks(z1), all_ranks(z2))", "vicreg_terms(z1, z2)",
         "two_processes -k vicreg"),
    ],
    "medssl/lejepa.py": [
        ("the mean over directions", "angles.cos().mean(1)", "angles.cos().mean(2)[:, None]", "losses -k lejepa"),
        ("half of the integral", "2 * torch.trapezoid", "torch.trapezoid", "losses -k sigreg"),
        ("agreement of images for that of views", "z_all.mean(0)).square()", "z_all.mean(1, keepdim=True)).square()",
         "losses -k lejepa"),
        ("the weights swapped", "self.sigreg_weight * normality + (1 - self.sigreg_weight) * invariance",
         "(1 - self.sigreg_weight) * normality + self.sigreg_weight * invariance", "losses -k lejepa"),
        ("directions of each process", "all_ranks(directions)[:len(directions)]", "directions",
         "two_processes -k lejepa"),
        ("directions of any length", "directions / directions.norm(dim=0)", "directions", "losses -k lejepa"),
    ],
    "medssl/swav.py": [
        ("rows before columns", "codes - codes.logsumexp(0, keepdim=True)\n        codes = codes - codes.logsumexp(1,",
         "codes - codes.logsumexp(1, keepdim=True)\n        codes = codes - codes.logsumexp(0,", "losses -k swav"),
        ("each crop guesses its own code", "if crop != code]", "if crop != 1 - code]", "losses -k swap"),
        ("the queue before it is full", "torch.where(self.queued >= self.queue_size, together, codes)", "together",
         "losses -k swav"),
        ("prototypes not of length one", "moved = F.normalize(self.prototypes, dim=1)",
         "moved = self.prototypes.clone()", "losses -k swav"),
        ("one queue for both views", "self.queue[view]", "self.queue[0]", "losses -k swav"),
        ("frozen one step too long", "self.steps >= self.freeze", "self.steps > self.freeze", "losses -k swav"),
        ("the temperature inverted", "(scores / temperature)", "(scores * temperature)", "losses -k swav"),
        ("small crops left out", "crop in range(len(scores))", "crop in range(2)", "losses -k swap"),
        ("rows of the first micro-batch only", "for out in outs], dim=1", "for out in outs[:1]], dim=1",
         "losses -k swav"),
    ],
    "medssl/moco.py": [
        ("keys by the trained network", "self.key_projector(self.key_encoder(x[rows]))",
         "self.projector(self.encoder(x[rows]))", "contract moco -k moco"),
        ("a slow network that gradients train", "copy.deepcopy(encoder).requires_grad_(False)",
         "copy.deepcopy(encoder)", "contract -k moco"),
        ("a negative in the positive's place", "[(q * k).sum(1, keepdim=True), negatives]",
         "[negatives, (q * k).sum(1, keepdim=True)]", "moco -k info_nce"),
        ("the temperature inverted", "similarities(q, k, queue, skip) / temperature",
         "similarities(q, k, queue, skip) * temperature", "moco -k info_nce"),
        ("keys stay shuffled", "torch.cat(keys)[order.argsort()]", "torch.cat(keys)", "moco -k keys_keep"),
        ("the order undone by itself", "torch.cat(keys)[order.argsort()]", "torch.cat(keys)[order]",
         "moco -k keys_keep"),
        ("keys share their statistics", "for rows in split_order(order, self.bn_chunks)]", "for rows in [order]]",
         "moco -k keys_keep"),
        ("momentum the wrong way round", "old.lerp_(new, 1 - momentum)", "old.lerp_(new, momentum)", "moco"),
        ("the pointer moves by one", "(self.pointer + len(keys)) %", "(self.pointer + 1) %", "moco -k queue"),
        ("more keys than rows written over each other", "% size)[-size:]", "% size)[:size]", "moco -k queue"),
        ("the queue is a view of the keys", "self.queue[rows] = keys[-len(rows):].to(self.queue.dtype)",
         "self.queue = torch.cat([self.queue, keys])[-len(self.queue):]", "moco -k queue"),
        ("other patients skipped for the same", "(groups[:, None] == queue_groups)",
         "(groups[:, None] != queue_groups)", "moco -k patient"),
        ("unknown patients are one", " & (groups[:, None] >= 0)", "", "moco -k patient"),
        ("patients of the queue not kept", "            self.queue_groups[rows] = groups[-len(rows):]\n", "",
         "moco -k patient or queue"),
        ("keys of the own process only", 'all_ranks(out["keys"]), all_ranks(out["groups"])',
         'out["keys"], out["groups"]', "two_processes -k moco"),
        ("keys of the last micro-batch only", "for out in outs:", "for out in outs[-1:]:", "moco loop -k queue"),
    ],
    "medssl/medmoco.py": [
        ("whitening over the wrong axis", "(x - x.mean(0))", "(x - x.mean(1, keepdim=True))", "medmoco -k whiten"),
        ("covariance by channels for rows", "x.mT @ x / x.shape[1]", "x.mT @ x / x.shape[2]", "medmoco -k whiten"),
        ("the sign of the whitening's gradient", "(-inner /", "(inner /", "medmoco -k gradient"),
        ("both regions through the first view", "(in_image - theta2[:, None, :, 2])",
         "(in_image - theta1[:, None, :, 2])", "medmoco -k anatomy"),
        ("the map not inverted", "torch.linalg.inv_ex(theta2[:, :, :2]).inverse.mT", "theta2[:, :, :2].mT",
         "medmoco -k anatomy"),
        ("x for y", "cell_weights(points[..., 0], maps.shape[3]", "cell_weights(points[..., 1], maps.shape[3]",
         "medmoco"),
        ("half a pixel aside", "(position + 1) * pixels / 2 - 0.5", "(position + 1) * pixels / 2", "medmoco"),
        ("regions outside count", "(log_share * valid).sum()", "log_share.sum()", "medmoco -k region_nce"),
        ("regions outside are negatives", "similarity.masked_fill(~valid[:, None] & ~own, -math.inf)", "similarity",
         "medmoco -k region_nce"),
        ("hidden regions chosen first", "device=shown.device) + shown", "device=shown.device) - 1. * shown",
         "medmoco -k anatomy"),
        ("the local weight not heeded", 'loss + self.local_weight * outs["local"]', 'loss + outs["local"]', "medmoco"),
        ("a local projector that stays", "ema_update(self.key_local_projector, self.local_projector, self.momentum)",
         "pass", "medmoco -k slow"),
        ("keys not whitened in their chunks", "for rows in split_order(order, self.bn_chunks)]", "for rows in [order]]",
         "medmoco -k chunk"),
    ],
    "medssl/spark.py": [
        ("the loss on visible patches", "(error * ~active).sum() / (~active).sum()",
         "(error * active).sum() / active.sum()", "spark -k loss"),
        ("the loss on all patches", "(error * ~active).sum() / (~active).sum().clamp(min=1)", "error.mean()",
         "spark -k loss"),
        ("the mask inverted", "(rank < keep)", "(rank >= keep)", "spark -k number"),
        ("the mask's share inverted", "(1 - self.mask_ratio) * h * w", "self.mask_ratio * h * w", "spark -k number"),
        ("one mask for the batch", "torch.rand(len(x), h * w, device=x.device).argsort(1).argsort(1)",
         "torch.rand(1, h * w, device=x.device).argsort(1).argsort(1).expand(len(x), -1)", "spark contract -k spark"),
        ("hidden places leak", "layer.register_forward_hook(partial(hide, mask))", "pass", "spark -k hidden"),
        ("statistics with hidden places", "count = visible.sum()", "count = y[:, :1].numel()", "spark -k norm"),
        ("a biased running variance", "variance * count / (count - 1)", "variance", "spark -k norm"),
        ("targets as they are", "target = normalise(target, eps)", "target = 1 * target", "spark -k loss"),
        ("black for the mean", "torch.where(self.mask.at(x), x, self.fill)", "torch.where(self.mask.at(x), x, 0.0)",
         "spark -k zero"),
        ("no tokens", "token.to(f.dtype).view(1, -1, 1, 1)", "0 * token.to(f.dtype).view(1, -1, 1, 1)",
         "spark -k token"),
        ("the mask stays on", "        finally:\n            self.mask.active = None",
         "        finally:\n            pass", "spark -k outside"),
        ("the picture the wrong way round", "torch.where(active, x, painted)", "torch.where(active, painted, x)",
         "spark -k picture"),
    ],
    "medssl/rotation.py": [
        ("the other direction", "images.rot90(k, (2, 3))", "images.rot90(k, (3, 2))", "pretext -k turn or undo"),
        ("labels of other turns", "four[turns % 4,", "four[(turns + 1) % 4,", "pretext -k undo"),
        ("half of the turns never", "torch.randint(4,", "torch.randint(2,", "pretext -k uniform"),
    ],
    "medssl/relative.py": [
        ("the centre as its own neighbour", "position + (position > 3)", "position + (position > 4)",
         "pretext -k undo"),
        ("rows for columns", "(images.shape[2], cells // grid), (images.shape[3], cells % grid)",
         "(images.shape[2], cells % grid), (images.shape[3], cells // grid)", "pretext -k undo"),
        ("the gap left out", "space, play = math.ceil(gap * cell)", "space, play = math.ceil(0 * gap * cell)",
         "pretext -k gap"),
        ("images mixed up", "torch.cat(z.chunk(2), 1)", "z.reshape(len(centre), -1)", "pretext -k own_tiles"),
    ],
    "medssl/jigsaw.py": [
        ("the permutation not inverted", "[:, None], order]", "[:, None], order.argsort(1)]", "pretext -k shuffle"),
        ("images mixed up", "z.reshape(len(tiles), -1)", "z.reshape(-1, len(tiles)).T", "pretext -k own_tiles"),
        ("orders near each other", "torch.minimum(smallest, distance)", "torch.maximum(smallest, distance)",
         "pretext -k permutations or greedy"),
        ("an order for the batch", "(len(images),), device=images.device)       # (B,)",
         "(1,), device=images.device).repeat(len(images))", "pretext contract -k jigsaw or undo or uniform"),
    ],
    "medssl/rubik.py": [
        ("left-right for up-down", "tiles.flip(4), torch.where(turning == 2, tiles.flip(3)",
         "tiles.flip(3), torch.where(turning == 2, tiles.flip(4)", "pretext -k turning"),
        ("flips of labels, not of tiles", "turn_over(shuffle(tiles, self.orders[which]), turning)",
         "shuffle(tiles, self.orders[which])", "pretext -k undo or mask_label"),
        ("the mask's label inverted", "(kept | ~masked", "(kept | masked", "pretext -k mask"),
        ("answers swapped", '"horizontal": turning == 1, "vertical": turning == 2',
         '"horizontal": turning == 2, "vertical": turning == 1', "pretext -k rubik"),
    ],
    "medssl/autoencoder.py": [
        ("another picture for a target", '"loss": F.mse_loss(restored, x)', '"loss": F.mse_loss(restored, x.flip(3))',
         "restoring -k autoencoder"),
        ("chance over the batch", "images.var((2, 3), correction=0)", "images.var((0, 2, 3), correction=0)",
         "restoring -k autoencoder"),
        ("a mean of 118", "((values >= 0) & (values <= 1)).all()", "values.numel()", "restoring -k a_mean"),
        ("pictures that start at a half", "(raw + level).sigmoid()", "raw.sigmoid()", "restoring -k first_picture"),
    ],
    "medssl/genesis.py": [
        ("the target is distorted too", "painted, x), target ", "painted, x), x ", "restoring -k genesis"),
        ("the input for a target", '"loss": F.mse_loss(restored, target)', '"loss": F.mse_loss(restored, distorted)',
         "restoring -k genesis"),
        ("chance knows each image's mean", "images.var((0, 2, 3), correction=0)", "images.var((2, 3), correction=0)",
         "restoring -k genesis"),
        ("noise outside the boxes", "torch.where(boxes(images, 1 / 6, 1 / 3, sure=0), torch.rand_like(images), images)",
         "torch.where(boxes(images, 1 / 6, 1 / 3, sure=0), images, torch.rand_like(images))", "restoring -k paint"),
        ("blocks of two rows share a number", "(columns.amax() + 1)", "columns.amax()", "restoring -k shuff"),
        ("a mean that is not what it is before the sigmoid", "0.99).logit()", "0.99)", "restoring -k first_picture"),
        ("curves go round", "torch.where(falling[:, None], y.flip(1), y)", "y", "restoring -k curve"),
    ],
    "medssl/pcrl.py": [
        ("pictures that start black", "self.level + raw", "raw", "restoring -k first_pictures"),
        ("features mixed the other way", "share * new + (1 - share) * old", "(1 - share) * new + share * old",
         "restoring -k pcrl_terms"),
        ("pictures mixed the other way", "share * a + (1 - share) * b", "(1 - share) * a + share * b",
         "restoring -k mix"),
        ("the code not heeded", "levels[-1] * gate[:, :, None, None]", "levels[-1] * 0.5",
         "restoring -k control_vector"),
        ("one code for all pictures", "self.control(codes).sigmoid().unbind(1)",
         "[self.control(codes[:, 0]).sigmoid()] * 3", "restoring -k pcrl or control_vector"),
        ("the mixture's share below a half", "alpha = torch.maximum(alpha, 1 - alpha)", "alpha = alpha * 1",
         "restoring -k pcrl"),
        ("mixtures not in the queue", 'torch.cat([all_ranks(out["keys"]), all_ranks(out["mixed"])])',
         'all_ranks(out["keys"])', "restoring -k queue"),
        ("each view painted by its own draw", "(torch.where(painted, torch",
         "(torch.where(torch.rand_like(painted.float()) < self.paint, torch", "restoring -k pcrl"),
        ("turned back before it is turned", "return flip(rotate(images, -code[:, 2:].argmax(1)), code)",
         "return rotate(flip(images, code), -code[:, 2:].argmax(1))", "restoring -k undone"),
    ],
    "medssl/together.py": [
        ("the weights not heeded", 'sum(self.weights[name] * out["loss"]', 'sum(out["loss"]', "pretext -k together"),
        ("everyone sees the first part's views", "for (name, part), view in zip(self.parts.items(), views)",
         "for (name, part), view in zip(self.parts.items(), views[:1] * 9)", "pretext -k parts or together"),
        ("only the first part's after_step", "for name, part in self.parts.items():\n            own",
         "for name, part in [*self.parts.items()][:1]:\n            own", "pretext -k parts"),
    ],
    "medssl/common/loop.py": [
        ("accumulation not averaged", 'out["loss"] / config.accum', 'out["loss"]', "loop -k accumulation"),
        ("gradients never cleared", "            optimizer.zero_grad(set_to_none=True)\n", "", "loop -k own_gradient"),
        ("views drawn alike in all steps", "mix(config.seed, step, micro * world + rank)",
         "mix(config.seed, 0, micro * world + rank)", "loop -k drawn"),
        ("views drawn alike in all parts", "mix(config.seed, step, micro * world + rank)", "mix(config.seed, step)",
         "loop -k drawn"),
        ("views drawn alike in all processes", "mix(config.seed, step, micro * world + rank)",
         "mix(config.seed, step, micro)", "loop -k two_processes"),
        ("processes see the same images", "[micro * world + rank::parts]", "[micro * world::parts]",
         "loop -k two_processes"),
        ("gradients of processes not averaged", "micro + 1 == config.accum", "False", "loop -k processes or ranks"),
        ("sums for means across processes", "(values / world).tolist()", "values.tolist()", "loop -k two_processes"),
        ("sums for means over micro-batches", "for out in outs) / len(outs)", "for out in outs)",
         "loop -k accumulation"),
        ("resume loses the optimiser", 'optimizer.load_state_dict(state["optimizer"])', 'state["optimizer"]',
         "loop -k resume"),
        ("resume loses the scaler", 'scaler.load_state_dict(state["scaler"])', 'state["scaler"]', "loop -k scaler"),
        ("resume leaves a step out", 'return state["step"]', 'return state["step"] + 1', "loop -k resume"),
        ("progress from 0", "method.after_step(outs, (step + 1) / config.steps)",
         "method.after_step(outs, step / config.steps)", "loop -k after_step"),
        ("after_step before the optimiser's", "            scaler.step(optimizer)",
         "            method.after_step(outs, (step + 1) / config.steps)\n            outs = outs[:0] or outs"
         "\n            scaler.step(optimizer)", "loop -k after_step"),
        ("scaled gradients clipped", "scaler.unscale_(optimizer)", "pass", "loop -k clipping"),
        ("the trained encoder saved for the exported one",
         'encoders.save(encoders.exported(method), Path(config.out) / "encoder.pt")',
         'encoders.save(method.encoder, Path(config.out) / "encoder.pt")', "loop -k exported"),
        ("the decay's schedule backwards", "config.weight_decay, config.weight_decay_end)",
         "config.weight_decay_end, config.weight_decay)", "loop -k decay"),
        ("rates of groups not heeded", 'lr * group["lr_scale"]', "lr", "loop -k groups"),
        ("decay on what should not", 'decay if group["decays"] else 0.0', "decay", "loop -k decay"),
        ("learnt from all rows", "yield rows[order[", "yield np.arange(len(dataset.images))[order[", "loop -k rows"),
        ("trained as it was found, perhaps in evaluation mode", "memory_format=torch.channels_last).train()",
         "memory_format=torch.channels_last)", "loop -k mode"),
        ("a loss that is infinite passes", '~outs[-1]["loss"].isfinite()', 'outs[-1]["loss"].isnan()',
         "loop -k finite"),
    ],
    "medssl/common/feed.py": [
        ("labels of other images", "torch.from_numpy(whole[rows])", "torch.from_numpy(whole[np.sort(rows)])",
         "loop -k targets"),
        ("each pass in the same order", "shuffled(count, seed, epoch, weights)[i",
         "shuffled(count, seed, 0, weights)[i", "loop -k pass"),
        ("one order for all seeds", "mix(seed, epoch, -1)", "mix(epoch, -1)", "loop -k pass"),
        ("16 bits clipped to 8", "pictures.float() / np.iinfo(dtype).max", "(pictures.float() / 255).clamp(max=1)",
         "loop -k floats"),
        ("sorted reads stay sorted", "pictures[order] = images[rows[order]]", "pictures[:] = images[rows[order]]",
         "loop -k floats"),
        ("the tail of a pass twice", "divmod(step, count // batch)", "divmod(step, count // batch + 1)",
         "loop -k pass"),
    ],
    "medssl/common/optim.py": [
        ("decay on norms", ", NORMS):", ", nn.GroupNorm):", "optim -k norms"),
        ("decay on biases", 'last.endswith("bias")', 'last.endswith("none")', "optim"),
        ("warm-up a step early", "lr * step / warmup", "lr * (step + 1) / warmup", "optim -k schedules"),
        ("the cosine begins with the warm-up", "(step - warmup) / max(1, steps - warmup)", "step / steps",
         "optim -k schedules"),
        ("LARS without decay in its ratio", 'g_norm + group["weight_decay"] * w_norm', "g_norm", "optim -k lars"),
        ("LARS scales biases", 'if group["decays"]:\n                    w_norm, g_norm',
         "if True:\n                    w_norm, g_norm", "optim -k lars"),
        ("LAMB without its correction at the start", 'm / (1 - beta1 ** group["step"])', "m", "optim -k lamb"),
        ("LAMB's ratio inverted", "w_norm / u_norm, 1.0", "u_norm / w_norm, 1.0", "optim -k lamb"),
        ("rates of parts not heeded", "name.startswith(prefix)", "name.endswith(prefix)", "optim -k prefix"),
        ("a gray image's last layer taken for a bias", '(p if last == "weight" else p.squeeze())', "p.squeeze()",
         "optim -k gray"),
        ("the ratio not clipped", '(ratio / group["lr"]).clamp(max=1)', 'ratio / group["lr"]', "optim -k larc"),
    ],
    "medssl/common/augment.py": [
        ("the sign of a rotation", "-sin * box_h * aspect", "sin * box_h * aspect", "augment -k turn or direction"),
        ("turns of oblong images sheared", "aspect = height / width", "aspect = 1", "augment -k rigid"),
        ("masks warped bilinearly", 'mode="nearest", padding_mode="zeros"', 'mode="bilinear", padding_mode="zeros"',
         "augment readouts -k mask"),
        ("masks go on outside", 'mode="nearest", padding_mode="zeros"', 'mode="nearest", padding_mode="border"',
         "augment -k mask"),
        ("corners aligned", "(len(images), 1, size * k, size * k), align_corners=False",
         "(len(images), 1, size * k, size * k), align_corners=True", "augment -k theta or exact"),
        ("crops reach outside", "* (1 - side) * found", "* found", "augment -k crops"),
        ("one flip for the batch", "chance(count, self.flip, device), -box_w", "chance(1, self.flip, device), -box_w",
         "augment -k probabilities or direction"),
        ("the flip in theta only", "box_w = torch.where(chance(count, self.flip, device), -box_w, box_w)",
         "box_w = torch.where(chance(count, self.flip, device), box_w, box_w)", "augment -k probabilities or flip"),
        ("brighter than white", "(jittered * factor(self.brightness)).clamp(0, 1)",
         "jittered * factor(self.brightness)", "augment -k recipe or jitter"),
        ("the dark solarised", "torch.where(x >= 0.5, 1 - x, x)", "torch.where(x < 0.5, 1 - x, x)",
         "augment -k solarise"),
        ("every second pixel", "F.avg_pool2d(views, k) if k > 1", "views[..., ::k, ::k] if k > 1", "augment -k shrink"),
        ("one brightness for the batch", "uniform(count, max(0, 1 - spread), 1 + spread, device)",
         "uniform(1, max(0, 1 - spread), 1 + spread, device)", "augment -k jitter or recipe"),
        ("never by 270 degrees", "torch.randint(1, 4, (count,)", "torch.randint(1, 3, (count,)", "augment -k quarter"),
        ("width for height", "(area * ratio).sqrt() / width, (area / ratio).sqrt() / height",
         "(area / ratio).sqrt() / width, (area * ratio).sqrt() / height", "augment -k crops"),
        ("a crop that does not fit clamped", "torch.where(found, side.gather(1, first).squeeze(1), whole)",
         "side.gather(1, first).squeeze(1).clamp(max=1)", "augment -k crops_that"),
        ("a dark border", 'padding_mode="border", align', 'padding_mode="zeros", align', "augment -k fades"),
        ("blur of the wrong axis", "weights(x.shape[2]) @ x @", "x @ weights(x.shape[3]) @", "augment -k blur"),
    ],
    "medssl/common/unet.py": [
        ("fewer maps than classes", "max(8, 2 * channels, below // 2)", "max(8, below // 2)", "restoring -k last_maps"),
        ("a skip connection where there is none", "skip if self.skips else None", "skip * self.skips",
         "restoring -k decoder_sizes"),
        ("the fine maps first", "reversed(maps[:-1])", "maps[:-1]", "restoring -k decoder_sizes"),
    ],
    "medssl/common/encoders.py": [
        ("standardised in the wrong order", "(x - self.shift) / self.scale", "x / self.scale - self.shift",
         "encoders -k standard"),
        ("nopool pools", 'if stem == "default" else nn.Identity()', 'if stem != "small" else nn.Identity()',
         "encoders -k stems"),
        ("gray weights are the mean", "weight.sum(1, keepdim=True)", "weight.mean(1, keepdim=True)",
         "encoders -k loads"),
        ("spread weights not divided", "weight.repeat(1, channels, 1, 1) / channels",
         "weight.repeat(1, channels, 1, 1)", "encoders -k loads"),
        ("the slow copy taken", "if not NOT_TAKEN.search(prefix)", "if NOT_TAKEN.search(prefix)",
         "encoders -k libraries"),
        ("stems taken for each other", 'if stem and known.get("stem", stem) != stem:', "if False:",
         "encoders -k made_with"),
        ("what is missing stays random", '((missing, "missing"), (extra', "((extra", "encoders -k refuses"),
    ],
    "medssl/common/metrics.py": [
        ("AUC of the wrong class", "scores[:, -1] if scores.ndim == 2", "scores[:, 0] if scores.ndim == 2",
         "metrics -k two_classes"),
        ("ties count for the positive", "np.cumsum(count) - (count - 1) / 2", "np.cumsum(count)", "metrics -k auc"),
        ("absent classes count 0", "out=np.full(above.shape, np.nan)", "out=np.zeros(above.shape)",
         "metrics -k absent"),
        ("kappa with plain distances", "(grade[:, None] - grade) ** 2", "np.abs(grade[:, None] - grade)",
         "metrics -k many"),
        ("a bootstrap over images", "groups = np.unique(array(groups), return_inverse=True)[1].ravel()",
         "groups = np.arange(len(groups))", "metrics -k bootstrap"),
        ("other draws at each call", "random = np.random.default_rng(seed)", "random = np.random.default_rng()",
         "metrics -k bootstrap or draws"),
        ("intervals of 90 %", "[2.5, 97.5]", "[5, 95]", "metrics -k draws"),
        ("half of Dice", "ratio(2 * np.asarray(both)", "ratio(np.asarray(both)", "metrics -k masks"),
        ("deviation with n for n - 1", "values.std(ddof=1)", "values.std()", "metrics -k interval"),
        ("the spectrum not centred", "features - features.mean(0)) ** 2", "features) ** 2", "metrics -k features"),
        ("normal for t", "t_quantile(len(values) - 1) * values", "1.96 * values", "metrics -k interval"),
    ],
    "medssl/common/features.py": [
        ("BatchNorm in training mode under a probe", "    encoder.eval()\n", "", "readouts -k extraction"),
        ("the encoder left in evaluation mode", "for i in range(0, len(rows), size)]\n    encoder.train(training)",
         "for i in range(0, len(rows), size)]", "readouts -k extraction"),
        ("neighbours by length", "F.normalize(train_features, dim=1)", "train_features", "readouts -k knn"),
        ("the temperature inverted", "(nearest / temperature)", "(nearest * temperature)", "readouts -k knn"),
        ("statistics of the last batch", "norm.momentum = None ", "norm.momentum = 1.0 ", "readouts -k statistics"),
        ("thumbnails of a corner", "F.adaptive_avg_pool2d(x, side)", "x[:, :, :side, :side]", "evaluate -k another"),
        ("thumbnails as they are", " - mean) / std ", ") ", "evaluate -k another"),
    ],
    "medssl/common/monitor.py": [
        ("the method left in evaluation mode", "        method.train(training)\n", "", "train -k a_look"),
        ("a kNN that knows what it is asked", "known, asked = self.features(encoder, self.train)",
         "known, asked = self.features(encoder, self.val)", "train -k random"),
        ("one random network for both", '"before training, normalised": normalised}',
         '"before training, normalised": first}', "train -k random"),
        ("the trained encoder watched for the exported one", "encoder = encoders.exported(method)",
         "encoder = method.encoder", "train -k a_look"),
    ],
    "medssl/common/presets.py": [
        ("no least number of steps", 'max(plan["least"], PASSES * per_epoch)', "PASSES * per_epoch", "train -k preset"),
        ("a warm-up longer than a tenth", "min(warmup, steps // 10)", "warmup", "train -k preset"),
        ("a warm-up that was asked for cut short", 'warmup if "warmup" in given else min(', "min(",
         "train -k optimiser"),
        ("test images counted", "sum(split in LEARNT_FROM for split in source.splits)", "len(source.splits)",
         "train -k looked_at"),
        ("a batch larger than the set", 'plan["batch"] //= 2', "break", "train -k preset"),
    ],
    "medssl/common/settings.py": [
        ("the rate per 256 the wrong way", "self.batch / 256 if", "256 / self.batch if", "train -k recipes"),
        ("the rate per 256 for all", "if self.optimizer in optim.SCALED else 1.0", "if self.optimizer else 1.0",
         "train -k recipes"),
        ("the deviation for the mean", '"mean": encoder.mean}', '"mean": encoder.std}', "train -k before_the_first"),
        ("the preset wins over flags", "part.words | own", "own | part.words", "train -k preset"),
        ("a queue larger than the set", "max(1, int(presets.QUEUE * found.images))", "queue", "train -k preset"),
        ("the paper's views over --views", "views or part.views", "part.views or views", "train -k preset"),
        ("another's options", 'if given.get("optimizer", plan["optimizer"]) == plan["optimizer"]:', "if True:",
         "train -k optimiser"),
    ],
    "medssl/common/files.py": [
        ("half-written files", "        yield temporary\n        os.replace(temporary, path)", "        yield path",
         "encoders -k whole"),
        ("pickles run", "weights_only=True", "weights_only=False", "encoders evaluate -k refuses or evil"),
        ("the log not cut back", 'if record["step"] <= start', "if record", "loop train -k resume or killed"),
    ],
    "train.py": [
        ("what --init leaves out untold", ', lambda line: say(f"note: {line}")', "", "train -k leaves_what"),
    ],
    "medssl/common/data": [
        ("classes by text, 10 before 9", "distinct.sort(key=int)", "distinct.sort(key=str)", "data -k split_csv"),
        ("a patient in two splits", '    refuse_leaks(source, source.groups, "group {}")\n', "",
         "data -k refused_tables"),
        ("an image in two splits", '    refuse_leaks(source, rows["hashes"].tolist(), *SAME_IMAGE)\n', "",
         "data -k refused_tables"),
        ("statistics of the test images", "pooled(sums[learnt] if len(learnt) else sums)", "pooled(sums)",
         "data -k split_csv"),
        ("a split by image", "rows if dataset.groups is None else dataset.groups[rows]", "rows", "data -k split_keeps"),
        ("patients below images/ become classes", "if not masks and not solid and", "if not solid and",
         "sources -k patients"),
        ("shares missed without another try", "missed(side, counts, fractions) > FAR:      ",
         "False:      ", "sources -k shares"),
        ("the unlabeled dealt too", 'groups[dataset.rows("train", "val", "test")]', "groups", "sources -k dealing"),
        ("labels without images", "    if lost:", "    if False:", "sources -k without_images"),
        ("gray decoded twice", "if wanted.channels and (plain", "if False and (plain", "sources -k decoded_once"),
        ("statistics of a split's test images", "np.flatnonzero(np.isin(splits, LEARNT_FROM)) if fractions[0]",
         "np.arange(len(dataset)) if fractions[0]", "data -k moments"),
        ("masks resized bilinearly", "wanted.fit, Image.NEAREST)", "wanted.fit)", "data -k masks_take"),
        ("16 bits clipped when resized", "np.rint(np.stack(layers, -1))", "np.rint(np.stack(layers, -1)).clip(0, 255)",
         "data sources -k bits or layout"),
        ("the window swapped", "        return window\n", "        return window[::-1]\n", "data -k volumes"),
        ("the wrong axis cut across", "np.moveaxis(array, axis, 0)", "np.moveaxis(array, 2 - axis, 0)",
         "data -k volumes"),
        ("each slice scaled by itself", "image = pixels.eight_bits(layer, low, high)",
         "image = pixels.eight_bits(layer, *pixels.grey_range(layer, wanted.window, wanted.percentiles))",
         "data -k scaled"),
        ("masked slices dropped as empty", " and (mask is None or not mask.any())", "", "data -k scaled"),
        ("near copies across patients", "self.near.setdefault(group, [])", 'self.near.setdefault("", [])',
         "data -k dedupe"),
        ("near copies kept", "if group and is_near(near, others):", "if False:", "data -k dedupe"),
        ("of copies the training one kept", '{"test": 0, "val": 1}', '{"test": 4, "val": 3}', "data -k copies"),
        ("the first row of the next split", 'side="right")', 'side="left")', "data -k arrays"),
        ("changed files not noticed", "{stat.st_size} {stat.st_mtime_ns}", "{stat.st_size}", "data -k cache"),
        ("square images are said to get bars", "sum(rows == columns != size", "sum(rows != columns != size",
         "data -k other_sizes"),
        ("padded at one side", "top, left = (size - rows) // 2, (size - columns) // 2", "top, left = 0, 0",
         "data -k masks_take"),
        ("moments of 16 bits", "sums[1] / top ** 2", "sums[1] / top", "data -k moments"),
        ("the whole match for the group", "match.group(bool(match.re.groups))", "match.group(0)",
         "data -k class_folders"),
        ("the column group not read", 'column("group")', 'column("patient")', "data -k split_csv or refused_tables"),
        ("NIfTI's axes in the wrong order", 'head["shape"][::-1]', 'head["shape"]', "readers -k nifti"),
        ("NIfTI's slope not applied", 'values *= head["slope"]', "values *= 1", "readers -k nifti"),
        ("the affine transposed", "letters(affine.T * (-1, -1, 1)) if sform", "letters(affine * (-1, -1, 1)) if sform",
         "readers -k affine"),
        ("left for right", "letters(affine.T * (-1, -1, 1)) if sform", "letters(affine.T * (1, -1, 1)) if sform",
         "readers -k affine"),
        ("axes flipped the wrong way", 'code[axis] in "SPL" else -1', 'code[axis] in "SAL" else -1', "readers -k axes"),
        ("a turned volume's axes", "[first + 2 - axis for axis in axes]", "[first + axis for axis in axes]",
         "readers -k axes"),
        ("a mask turned by its own header", "return _turned(array, path, code)", "return _turned(array, path, own)",
         "readers -k mask"),
        ("a series by file numbers",
         "places = [axes[2] @ np.array(fields.ImagePositionPatient, float) for fields in heads]", "places = numbers",
         "readers -k dicom_series"),
        ("a series from head to feet", "np.cross(row, column)", "np.cross(column, row)", "readers -k dicom_series"),
        ("MONOCHROME1 as it is stored", '== "MONOCHROME1"', '== "MONOCHROME3"', "readers -k dicom"),
        ("white is zero", "tags.get(262) == 0 and", "tags.get(262) == 9 and", "readers -k white"),
        ("EXIF not applied", "ImageOps.exif_transpose(image, in_place=True)", "pass", "readers -k orientation"),
        ("a series for a patient", '("patient", told.patient) if told.patient else',
         '("patient", told.series) if told.patient else', "sources -k patients"),
        ("names of patients kept", 'f"patient {numbers.setdefault(key, len(numbers) + 1)}"',
         'f"patient {numbers.setdefault(key, len(numbers) + 1)} {key[1]}"', "sources -k patients"),
        ("phantoms split by slice", "splits = splits[groups]", "splits = splits[np.arange(count) % len(splits)]",
         "phantoms -k splits"),
    ],
    "medssl/common/evaluation": [
        ("a frozen encoder's BatchNorm in training mode", "    encoder.train = lambda mode=True: encoder\n", "",
         "readouts -k frozen"),
        ("the L2 chosen on training rows", "metrics.balanced_accuracy(labels[val], affine(x[val]",
         "metrics.balanced_accuracy(labels[train], affine(x[train]", "readouts -k validation"),
        ("the L2 chosen on test rows", 'fit.rows, fit.target.rows["val"], fit.classes',
         'fit.rows, fit.target.rows["test"], fit.classes', "evaluate -k validation_rows"),
        ("the epoch chosen on test rows", 'fit.study.settings, fit.target, fit.target.rows["val"]',
         'fit.study.settings, fit.target, fit.target.rows["test"]', "evaluate -k validation_rows"),
        ("features standardised over test rows", "features[train].mean(0), features[train].std(0, correction=0)",
         "features.mean(0), features.std(0, correction=0)", "readouts -k standardises"),
        ("the bias penalised", "weights[:-1].square().sum()", "weights.square().sum()", "readouts -k logistic"),
        ("masks that stay where images move", "augment.warp(masks, theta).long()", "masks.long()",
         "readouts -k masks_take"),
        ("absent classes in the Dice loss", "(true > 0) * class_weights",
         "(true > -1) * class_weights", "readouts -k losses"),
        ("the last weights for the best", "    method.load_state_dict(best[1])\n", "", "readouts -k best"),
        ("class weights not heeded", "F.cross_entropy(self.logits(x), labels, self.class_weights)",
         "F.cross_entropy(self.logits(x), labels)", "readouts -k class_weights"),
        ("Dice over all patients' slices", "np.add.at(sums, patient, counts)", "np.add.at(sums, 0 * patient, counts)",
         "readouts -k mask_scores"),
        ("background in the mean", "metrics.mean_defined(each[1:])", "metrics.mean_defined(each)",
         "readouts -k mask_scores"),
        ("intervals over images", "return Scored(scores, tuple(heads), again, groups)",
         "return Scored(scores, tuple(heads), again, np.arange(len(labels)))", "evaluate -k intervals"),
        ("sums for means of a patient", "sums / np.bincount(self.member)[:, None]", "sums", "readouts -k by_patient"),
        ("a lucky seed settles", "math.hypot(over_patients, over_seeds)", "over_patients", "readouts -k settled"),
        ("few patients settle", "math.hypot(over_patients, over_seeds)", "over_seeds", "readouts -k settled"),
        ("the wrong side of 0", "(draws <= 0)", "(draws >= 0)", "readouts -k gain"),
        ("subsets split patients", "order[:ends[np.abs(ends - float(amount) * len(order)).argmin()]]",
         "order[:round(float(amount) * len(order))]", "readouts -k subsets"),
        ("validation images learnt from", 'rows["train"] = np.setdiff1d(rows["train"], rows["val"])',
         'rows["train"] = rows["train"]', "readouts -k validation_patients"),
        ("validation splits patients", 'prefix(order, groups[order], "0.15")', "order[:len(order) * 15 // 100]",
         "readouts -k validation_patients"),
        ("the same subset for every seed", "self.strata[rows], seed)", "self.strata[rows], 0)", "readouts -k rarer"),
        ("the rare class not kept", "keep[rare] = few", "keep[rare] = 10 * few", "readouts -k rare"),
        ("answers of validation rows scored", 'test, study = fit.target.rows["test"], fit.study',
         'test, study = fit.target.rows["val"], fit.study', "evaluate -k scored_once"),
        ("validation rows learnt from", 'rows = self.rows["train"]\n',
         'rows = np.concatenate([self.rows["train"], self.rows["val"]])\n', "evaluate -k results"),
        ("differences the wrong way round", "two.scored.scores[head] - one.scored.scores[head]",
         "one.scored.scores[head] - two.scored.scores[head]", "evaluate -k differences"),
        ("seeds that one lacks", "seeds = set.intersection(", "seeds = set.union(", "evaluate -k differences"),
        ("one random encoder for all seeds", "        torch.manual_seed(seed)\n        dataset = study.dataset",
         "        torch.manual_seed(0)\n        dataset = study.dataset", "evaluate -k results"),
        ("fine-tuning changes the model", "return copy.deepcopy(self.network)", "return self.network",
         "evaluate -k results"),
        ("fits of other weights go on", "{model.network and fingerprint(model.network)}", "",
         "evaluate -k other_weights"),
        ("seeds share their fits", 'f"seed{seed}"', '"seed"', "evaluate -k goes_on"),
        ("features in the order of the file", "features[[place[name] for name in wanted]]", "features[:len(wanted)]",
         "evaluate -k another_program"),
        ("heads drawn on", "    network = fit.model.fresh(fit.study, fit.seed)\n    torch.manual_seed(fit.seed)\n",
         "    network = fit.model.fresh(fit.study, fit.seed)\n", "evaluate -k order_and_head"),
        ("statistics as they came", 'if study.settings.statistics == "data":', "if False:", "evaluate -k statistics"),
        ("the rare class thinned beside the others", 'if imbalance.varies == "rare":', "if True:", "readouts -k rare"),
        ("always the same optimiser", "optimizer=settings.optimizer", 'optimizer="adamw"', "evaluate -k series"),
        ("always as many neighbours", "min(fit.study.settings.neighbours,", "min(20,", "readouts -k neighbours"),
        ("grades half a step aside", "[:, None] - grades)", "[:, None] - grades - 0.5)", "readouts -k grades"),
        ("a part of a file read as a smaller network", 'if name or "layer4" not in besides:', "if True:",
         "evaluate -k evil"),
        ("a run's checkpoint is a row of its own", 'or of_a_run and file.stem == "checkpoint"', "",
         "evaluate -k rows_are_named"),
        ("neighbours that outvote a class", "2 * smallest - 1", "2 * len(fit.rows)", "readouts -k neighbours"),
        ("changed images at training too", "network(robustness.CHANGES[n](x, s))", "network(x)",
         "evaluate -k stages_changes"),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-k", metavar="WORD", default="", help="only faults with this word")
    parser.add_argument("--list", action="store_true", help="say what would be broken, and break nothing")
    args = parser.parse_args()
    chosen = [(place, *fault) for place, faults in FAULTS.items() for fault in faults
              if args.k in f"{place} {fault[0]} {fault[3]}"]
    if args.list:
        print("\n".join(f"{place}: {what} ({tests})" for place, what, _, _, tests in chosen))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in WARM:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder) / "checkout"
        copy_checkout(copy)
        found = sum([is_found(copy, *fault) for fault in chosen])
    print(f"{found} of {len(chosen)} faults found")
    sys.exit(found < len(chosen))


def copy_checkout(copy):
    """The files that git knows or would, and their byte code. Python holds it against the source's hash, as times and
    sizes of files do not tell two faults apart."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    compileall.compile_dir(copy, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def is_found(copy, place, what, old, new, tests):
    """Breaks the copy, runs the tests, mends it, and prints one line."""
    start = time.perf_counter()
    paths = sorted((copy / place).rglob("*.py")) if (copy / place).is_dir() else [copy / place]
    texts = {path: path.read_text() for path in paths if path.is_file()}
    count = sum(text.count(old) for text in texts.values())
    if count != 1:
        print(f"ABSENT    {place}: {what}: its text stands there {count} times: {old}", flush=True)
        return False
    path = next(path for path, text in texts.items() if old in text)
    path.write_text(texts[path].replace(old, new))
    status, said = run(copy, tests)
    path.write_text(texts[path])
    word = {0: "SURVIVED", 1: "found"}.get(status, "FAILED")                # 4, 5: there are no such tests
    print(f"{word:9} {place}: {what} ({time.perf_counter() - start:.1f} s; {tests})", flush=True)
    if word == "FAILED":
        print(said[-2000:], flush=True)
    return word == "found"


def run(copy, tests):
    """Exit status of these tests and what they said. The child has what this process has imported, and nothing of the
    checkout."""
    names, _, words = tests.partition(" -k ")
    command = ["-x", "-q", "-p", "no:cacheprovider", *[f"tests/test_{name}.py" for name in names.split()]]
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            try:
                os.chdir(copy)
                sys.path[:] = [str(copy)] + [path for path in sys.path if path != str(ROOT / "tests")]
                sys.dont_write_bytecode = True
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os._exit(pytest.main(command + ["-k", words] * bool(words)))
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")


if __name__ == "__main__":
    main()
