"""Networks of Hugging Face's transformers, from a configuration alone: against the dense matrix, and curvlinops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis import gradient_norms, hessian_eigs, hessian_trace
from fpq_analysis.curvature import HessianOperator, as_batches
from fpq_analysis.forward import with_forward
from tests.nets import dense_hessian

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "n_positions": 5, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_inner": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0, **sizes))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, (5, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    batch = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return model, batch


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    config = transformers.ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **sizes)
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return transformers.ViTForImageClassification(config), {"pixel_values": x, "labels": torch.arange(6) % 3}


def next_token(logits, labels):
    """A mean over sentences of the mean over their places that count."""
    losses = F.cross_entropy(logits[:, :-1].movedim(-1, 1), labels[:, 1:], ignore_index=-100, reduction="none")
    counted = labels[:, 1:] != -100
    return (losses.sum(1) / counted.sum(1)).mean()


CASES = {"gpt2": (gpt2, next_token), "vit": (vit, F.cross_entropy)}


class Logits(nn.Module):
    """For curvlinops: a tensor of outputs; and plain attention, as the fused one has no second derivative."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return self.model(**inputs).logits


@pytest.mark.parametrize("case", CASES)
def test_traces_eigenvalues_and_products_are_those_of_the_dense_hessian(case):
    make, loss = CASES[case]
    model, batch = make()
    model = model.double().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    plain = Logits(copy.deepcopy(model))
    parameters = [p for p in plain.parameters() if p.requires_grad]
    dense = dense_hessian(plain, parameters, inputs, labels, loss)

    found = hessian_trace(model, [batch], loss=loss, n_products=len(dense))
    assert abs(found.value - float(dense.trace())) < 4 * found.sem + 1e-8 * float(dense.diag().abs().sum())
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert hessian_eigs(model, batch, k=1, loss=loss, tol=1e-9).values[0] == pytest.approx(top, rel=1e-8)

    slope = torch.autograd.grad(loss(plain(inputs), labels), parameters)
    norms = gradient_norms(model, batch, loss=loss).frame().set_index(["layer", "quantity"])["value"]
    size = float(torch.stack([g.square().sum() for g in slope]).sum().sqrt())
    assert norms["all", "grad_norm@clean"] == pytest.approx(size, rel=1e-8)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    named = dict(model.named_parameters())
    ours = HessianOperator(with_forward(model), loss, as_batches([(inputs, labels)], 2), named)
    v = torch.randn(ours.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = [torch.arange(ours.size)[place] for place in ours.slices.values()]
    by_name = dict(zip(ours.slices, order, strict=True))
    same = torch.cat([by_name[name.removeprefix("model.")] for name, _ in plain.named_parameters()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(ours.matvec(v)[same], dense @ v[same], rtol=1e-8, atol=1e-10)


def test_vit_equals_curvlinops():
    from curvlinops import HessianLinearOperator

    model, batch = vit()
    model = model.double().eval()
    inputs, labels = {"pixel_values": batch["pixel_values"].double()}, batch["labels"]
    plain = Logits(model)
    # Without the weights of LayerNorm, whose entries of curvlinops' products are not what differences of the gradient
    # give with torch 2.14; ours are, and those of the dense matrix above.
    named = {name: p for name, p in model.named_parameters() if "norm" not in name or name.endswith("bias")}
    data, count = [(inputs, labels)], lambda x: len(x["pixel_values"])
    theirs = HessianLinearOperator(plain, nn.CrossEntropyLoss(), list(named.values()), data, batch_size_fn=count)
    ours = HessianOperator(with_forward(model), F.cross_entropy, data, named)
    v = torch.randn(ours.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.matvec(v), theirs @ v, rtol=1e-8, atol=1e-10)


def test_products_are_differences_of_the_gradient():
    model, batch = vit()
    model = model.double().eval()
    inputs, labels = {"pixel_values": batch["pixel_values"].double()}, batch["labels"]
    plain, named = Logits(model), dict(model.named_parameters())
    ours = HessianOperator(with_forward(model), F.cross_entropy, [(inputs, labels)], named)
    v = torch.randn(ours.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = ours.matvec(v)

    def slope(step):
        with torch.no_grad():
            for p, place in zip(named.values(), ours.slices.values(), strict=True):
                p += step * v[place].view_as(p)
        found = torch.autograd.grad(F.cross_entropy(plain(inputs), labels), list(named.values()))
        return torch.cat([g.flatten() for g in found])

    later, earlier = slope(1e-5), slope(-2e-5)
    torch.testing.assert_close(product, (later - earlier) / 2e-5, rtol=1e-4, atol=1e-4)
