"""What a LoRA adapter is, how it is stored, and how it is applied to a base model."""

from dynamic_lora_adapters.archive import Intake, UploadLimits
from dynamic_lora_adapters.card import CardExample, CardParameters, TaskCard
from dynamic_lora_adapters.errors import (
    AdapterCapacityError,
    AdapterError,
    AdapterNotFound,
    AdapterTooLarge,
    IncompatibleAdapter,
    InvalidAdapter,
    InvalidAdapterName,
    UnsafeArchive,
    UnsupportedAdapter,
)
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.index import AdapterEvent, EventKind
from dynamic_lora_adapters.inspection import AdapterVersion
from dynamic_lora_adapters.lease import Lease
from dynamic_lora_adapters.names import check_adapter_name
from dynamic_lora_adapters.passport import Passport
from dynamic_lora_adapters.registry import AdapterRegistry, Publication
from dynamic_lora_adapters.spec import LoraSpec
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms
from dynamic_lora_adapters.weights import read_adapter

__all__ = [
    "AdapterCapacityError",
    "AdapterError",
    "AdapterEvent",
    "AdapterNotFound",
    "AdapterRegistry",
    "AdapterTerms",
    "AdapterTooLarge",
    "AdapterVersion",
    "BaseGeometry",
    "CardExample",
    "CardParameters",
    "EventKind",
    "IncompatibleAdapter",
    "Intake",
    "InvalidAdapter",
    "InvalidAdapterName",
    "Lease",
    "LinearShape",
    "LinearTerms",
    "LoraSpec",
    "Passport",
    "Publication",
    "TaskCard",
    "UnsafeArchive",
    "UnsupportedAdapter",
    "UploadLimits",
    "check_adapter_name",
    "read_adapter",
]
