"""The servers and libraries that one workload is run against, one after another."""

from benchmarks.peers.base import HttpSession, Peer, Session, Setup
from benchmarks.peers.dynamic_lora import DynamicLora
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peft_static import PeftStatic
from benchmarks.peers.vllm_cpu import VllmCpu

_KNOWN: tuple[Peer, ...] = (
    DynamicLora(),
    DynamicLora(name="dynamic-lora-bf16", flags=("--quantize", "bf16")),
    DynamicLora(name="dynamic-lora-int8", flags=("--quantize", "int8")),
    DynamicLora(name="dynamic-lora-w8a8", flags=("--quantize", "w8a8")),
    VllmCpu(),
    VllmCpu(has_adapters=False),
    VllmCpu(dtype="bfloat16"),
    VllmCpu(dtype="bfloat16", has_adapters=False),
    VllmCpu(w8a8=True),
    VllmCpu(w8a8=True, has_adapters=False),
    LlamaCpp(),
    LlamaCpp(unified=True),
    LlamaCpp(weights="q8_0"),
    LlamaCpp(weights="q8_0", unified=True),
    LlamaCpp(weights="bf16", unified=True),
    LlamaCpp(weights="f32"),
    PeftStatic(),
    PeftStatic(dtype="bfloat16"),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _KNOWN}

__all__ = ["PEERS", "DynamicLora", "HttpSession", "Peer", "Session", "Setup"]
