"""The servers and libraries that one workload is run against, one after another."""

from benchmarks.peers.base import HttpSession, Peer, Session, Setup
from benchmarks.peers.dynamic_lora import DynamicLora
from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.peft_static import PeftStatic
from benchmarks.peers.vllm_cpu import VllmCpu

PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (DynamicLora(), VllmCpu(), PeftStatic(), LlamaCpp())
}

__all__ = ["PEERS", "HttpSession", "Peer", "Session", "Setup"]
