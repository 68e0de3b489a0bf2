"""What a LoRA adapter is, how it is stored, and how it is applied to a base model."""

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
from dynamic_lora_adapters.files.archive import Intake, UploadLimits
from dynamic_lora_adapters.files.card import CardExample, CardParameters, TaskCard
from dynamic_lora_adapters.geometry import BaseGeometry, LinearShape
from dynamic_lora_adapters.home.index import AdapterEvent, EventKind
from dynamic_lora_adapters.home.inspection import AdapterVersion
from dynamic_lora_adapters.home.lease import Lease
from dynamic_lora_adapters.home.passport import Passport, Publication
from dynamic_lora_adapters.home.registry import AdapterRegistry
from dynamic_lora_adapters.lora.spec import LoraSpec
from dynamic_lora_adapters.lora.weights import read_adapter
from dynamic_lora_adapters.names import check_adapter_name
from dynamic_lora_adapters.terms import AdapterTerms, LinearTerms

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
