"""Acceleration together with what else users do to a pipeline."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import pytest
import torch
from packaging.version import Version
from tiny_pipelines import TINY_PIPELINES, run_tiny

from dit_accel import accelerate_pipeline, acceleration_report, restore_pipeline

FAMILIES = ["wan", "hunyuan", "flux", "sd3"]
# With random weights, sparse attention is so far from dense that the guard would step in.
GNA: dict[str, Any] = {
    "method": "gna",
    "guard": False,
    "window": (1.0, 0.4, 0.4),
    "block_size": 16,
    "dense_steps": 0,
    "min_tokens": 0,
}


@pytest.fixture(params=FAMILIES)
def tiny(request):
    build, arguments = TINY_PIPELINES[request.param]
    return build(), arguments


def lora_config() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)


def test_lora_before_or_after_gives_the_same(tiny):
    pipe, arguments = tiny
    accelerate_pipeline(pipe, **GNA)
    without = run_tiny(pipe, arguments)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(lora_config())
    after = run_tiny(pipe, arguments)
    assert not torch.allclose(after, without, atol=1e-4)
    accelerate_pipeline(pipe, **GNA)  # now attached with the adapter in place
    assert torch.equal(run_tiny(pipe, arguments), after)
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(run_tiny(pipe, arguments), without)


@pytest.mark.parametrize("accelerate_first", [True, False])
def test_model_offload(tiny, accelerate_first):
    """`enable_model_cpu_offload` wraps each model's forward; neither order disturbs the other."""
    from accelerate import cpu_offload_with_hook

    pipe, arguments = tiny
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, **GNA)
    sparse = run_tiny(pipe, arguments)
    if not accelerate_first:
        restore_pipeline(pipe)
    cpu_offload_with_hook(pipe.transformer, "cpu")
    if not accelerate_first:
        accelerate_pipeline(pipe, **GNA)
    assert torch.equal(run_tiny(pipe, arguments), sparse)
    restore_pipeline(pipe)
    assert hasattr(pipe.transformer, "_hf_hook"), "restoring took the offload hook away"
    assert torch.equal(run_tiny(pipe, arguments), dense)


def test_group_offload(tiny):
    if Version(diffusers.__version__) < Version("0.40") and not torch.cuda.is_available():
        pytest.skip("this diffusers can't group-offload without an accelerator")
    pipe, arguments = tiny
    accelerate_pipeline(pipe, **GNA)
    sparse = run_tiny(pipe, arguments)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    torch.testing.assert_close(run_tiny(pipe, arguments), sparse)


def count_graphs(pipe: Any, arguments: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """Generate with every block compiled without graph breaks; return the number of graphs."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(pipe.transformer, name, []):
            block.compile(fullgraph=True, backend=count)
    out = run_tiny(pipe, arguments)
    torch._dynamo.reset()
    return len(graphs), out


def test_regional_compile_needs_no_more_graphs_than_stock(tiny, request):
    """Blocks compile without a graph break, and blocks of a kind share one graph."""
    pipe, arguments = tiny
    stock, _ = count_graphs(TINY_PIPELINES[request.node.callspec.params["tiny"]][0](), arguments)
    accelerate_pipeline(pipe, **GNA)
    eager = run_tiny(pipe, arguments)
    graphs, compiled = count_graphs(pipe, arguments)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert graphs <= stock
    assert acceleration_report(pipe).sparse_density < 1


def test_a_compiled_pipeline_plans_its_first_call():
    """Not every function of torch runs inside an operator of a compiled graph: vmap does not."""
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, **GNA)
    eager = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, **GNA)  # forgets its plans
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled = run_tiny(pipe, arguments)
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiny", [*FAMILIES, "wan22", "wan_vace", "flux_kontext"], indirect=True)
def test_compile_option(tiny):
    """Blocks are compiled without a graph break, and restoring takes the compiled ones away."""
    pipe, arguments = tiny
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, **GNA)
    eager = run_tiny(pipe, arguments)
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    accelerate_pipeline(pipe, **GNA, compile={"backend": count, "fullgraph": True})
    torch.testing.assert_close(run_tiny(pipe, arguments), eager, rtol=1e-4, atol=1e-4)
    assert acceleration_report(pipe).settings["compile"]
    assert acceleration_report(pipe).sparse_density < 1
    blocks = {type(m).__name__ for m in pipe.transformer.modules() if m._compiled_call_impl}
    assert any("TransformerBlock" in name for name in blocks)
    made = len(graphs)
    assert 1 <= made <= 3 * len(blocks)
    run_tiny(pipe, arguments)
    assert len(graphs) == made, "a second generation compiled again"
    restore_pipeline(pipe)
    assert not any(module._compiled_call_impl for module in pipe.transformer.modules())
    assert torch.equal(run_tiny(pipe, arguments), dense)
    assert len(graphs) == made
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", ["taylorseer", "unconditional_cache", "remainder_cache"])
def test_compile_option_beside_a_cache(cache):
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    both = {**GNA, "method": ["gna", cache]}
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, **both)
    eager = run_tiny(pipe, arguments)
    torch._dynamo.reset()
    accelerate_pipeline(pipe, **both, compile={"backend": "eager", "fullgraph": True})
    torch.testing.assert_close(run_tiny(pipe, arguments), eager, rtol=1e-4, atol=1e-4)
    restore_pipeline(pipe)
    assert not any(module._compiled_call_impl for module in pipe.transformer.modules())
    assert torch.equal(run_tiny(pipe, arguments), dense)
    torch._dynamo.reset()


def test_compile_option_refuses_what_cannot_be():
    pipe = TINY_PIPELINES["wan"][0]()
    with pytest.raises(ValueError, match="Did you mean 'mode'"):
        accelerate_pipeline(pipe, **GNA, compile={"mdoe": "default"})
    with pytest.raises(ValueError, match="must be True, False"):
        accelerate_pipeline(pipe, **GNA, compile="yes")
    stock = pipe.transformer
    pipe.transformer = torch.compile(stock, backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole already"):
        accelerate_pipeline(pipe, **GNA, compile=True)
    assert not hasattr(pipe, "_dit_accel")
    pipe.transformer = stock
    stock.compile_repeated_blocks = None
    with pytest.raises(ValueError, match=r"diffusers 0\.36"):
        accelerate_pipeline(pipe, **GNA, compile=True)


def test_precision_that_cannot_run_is_refused(tiny, monkeypatch):
    import triton

    pipe, arguments = tiny
    with pytest.raises(ValueError, match="Did you mean 'fp8'"):
        accelerate_pipeline(pipe, **GNA, precision="fp9")
    with pytest.raises(ValueError, match="pools blocks"):
        accelerate_pipeline(pipe, "psa", precision="fp8")
    with pytest.raises(ValueError, match="pools blocks"):
        accelerate_pipeline(pipe, **GNA, remainder="pooled", precision="fp8")
    accelerate_pipeline(pipe, **{**GNA, "block_size": 32, "dense_steps": 2}, precision="fp8")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="it needs an NVIDIA GPU"):  # at the first step
            run_tiny(pipe, arguments, num_inference_steps=3)


def test_precision_is_used_and_reported():
    """In Triton's interpreter."""
    from dit_accel import GNA as Gna

    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    pipe.transformer.to(torch.bfloat16)
    options: dict[str, Any] = {"dense_steps": 2, "min_tokens": 0}
    method = Gna(window=(1.0, 0.4, 0.4), block_size=32)
    accelerate_pipeline(pipe, method, **options)
    exact = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, method, **options, precision="fp8")
    low = run_tiny(pipe, arguments)
    report = acceleration_report(pipe)
    assert {call.precision for call in report.calls if not call.reason} == {"fp8"}
    assert {call.precision for call in report.calls if call.reason} == {"bfloat16"}
    assert {call.operator for call in report.calls if not call.reason} == {"triton"}
    assert report.settings["precision"] == "fp8"
    assert "fp8" in str(report)
    assert not torch.equal(low, exact)
    assert (low - exact).norm() < 0.05 * exact.norm()


def test_user_who_sets_another_backend_is_told(tiny):
    pipe, arguments = tiny
    dense = run_tiny(pipe, arguments)
    accelerate_pipeline(pipe, **GNA)
    pipe.transformer.set_attention_backend("native")
    with pytest.warns(UserWarning, match="no longer run through accelerate_pipeline"):
        out = run_tiny(pipe, arguments)
    torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)
    assert any("no longer run" in note for note in acceleration_report(pipe).notes)
    restore_pipeline(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(run_tiny(pipe, arguments), dense, rtol=1e-5, atol=1e-5)


def test_dense_calls_keep_the_backend_the_user_had_set():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    pipe.transformer.set_attention_backend("_native_math")
    accelerate_pipeline(pipe, **{**GNA, "dense_steps": 3})
    assert pipe._dit_accel.runtime.dense_backend == AttentionBackendName._NATIVE_MATH
    run_tiny(pipe, arguments)
    restore_pipeline(pipe)
    processors = [block.attn1.processor for block in pipe.transformer.blocks]
    assert {p._attention_backend for p in processors} == {AttentionBackendName._NATIVE_MATH}
    _AttentionBackendRegistry._active_backend = AttentionBackendName.NATIVE


def test_fused_projections(tiny):
    pipe, arguments = tiny
    accelerate_pipeline(pipe, **GNA)
    sparse = run_tiny(pipe, arguments)
    restore_pipeline(pipe)
    if type(pipe.transformer).__name__ == "SD3Transformer2DModel":
        pytest.skip("stock fused SD3 drops qk-norm and dual attention: nothing to compare with")
    pipe.transformer.fuse_qkv_projections()
    accelerate_pipeline(pipe, **GNA)
    torch.testing.assert_close(run_tiny(pipe, arguments), sparse, rtol=1e-4, atol=1e-4)


def test_pipelines_that_share_a_transformer():
    from diffusers import WanVideoToVideoPipeline

    pipe = TINY_PIPELINES["wan"][0]()
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae")}
    other = WanVideoToVideoPipeline(**parts, transformer=pipe.transformer, scheduler=pipe.scheduler)
    accelerate_pipeline(pipe, **GNA)
    with pytest.raises(ValueError, match="shares this transformer"):
        accelerate_pipeline(other, **GNA)
    restore_pipeline(pipe)
    accelerate_pipeline(other, **GNA)
    assert not hasattr(pipe, "_dit_accel")


def test_transformer_called_by_position_outside_a_pipeline():
    pipe = TINY_PIPELINES["wan"][0]()
    accelerate_pipeline(pipe, **GNA)
    latent, text = torch.randn(2, 16, 3, 10, 14), torch.randn(2, 7, 32)
    by_position = pipe.transformer(latent, torch.tensor([500, 500]), text)[0]
    by_name = pipe.transformer(
        hidden_states=latent, timestep=torch.tensor([500, 500]), encoder_hidden_states=text
    )[0]
    assert torch.equal(by_position, by_name)
    assert acceleration_report(pipe).sparse_density < 1


def test_an_error_inside_a_forward_does_not_stick():
    build, arguments = TINY_PIPELINES["wan"]
    pipe = build()
    accelerate_pipeline(pipe, **GNA)
    before = run_tiny(pipe, arguments)
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run_tiny(pipe, arguments)
    handle.remove()
    assert torch.equal(run_tiny(pipe, arguments), before)


def test_control_residuals_follow_the_token_order():
    """ControlNet residuals come in raster order; they must meet the reordered tokens."""
    for name, keyword in (
        ("flux", "controlnet_block_samples"),
        ("sd3", "block_controlnet_hidden_states"),
    ):
        build, arguments = TINY_PIPELINES[name]
        pipe = build()
        tokens = 255
        width = 64
        residuals = [torch.randn(1, tokens, width)]
        inputs = {}

        def grab(_module, _args, kwargs, inputs=inputs):
            inputs.update(kwargs)

        handle = pipe.transformer.register_forward_pre_hook(grab, with_kwargs=True)
        run_tiny(pipe, arguments, guidance_scale=1.0)
        handle.remove()
        inputs[keyword] = residuals
        dense = pipe.transformer(**inputs)[0]
        # A window over everything leaves nothing out, but its tile order is still applied.
        from dit_accel import GNA as Gna

        accelerate_pipeline(
            pipe, Gna(window=(1, 14, 16), block_size=16), dense_steps=0, min_tokens=0
        )
        nearly = pipe.transformer(**inputs)[0]
        close = (nearly - dense).abs().mean() / dense.abs().mean()
        assert close < 0.02, f"{name}: {close}"
