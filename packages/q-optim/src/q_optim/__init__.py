"""Optimizers whose states take a quarter of the memory, or an eighth, or none on the device."""

from q_optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit, PagedAdagrad, PagedAdagrad8bit, PagedAdagrad32bit
from q_optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    AdamW32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from q_optim.ademamix import AdEMAMix, AdEMAMix8bit, AdEMAMix32bit, PagedAdEMAMix, PagedAdEMAMix8bit, PagedAdEMAMix32bit
from q_optim.arguments import StorageArguments
from q_optim.lamb import LAMB, LAMB8bit, LAMB32bit, PagedLAMB, PagedLAMB8bit, PagedLAMB32bit
from q_optim.lars import LARS, LARS8bit, LARS32bit, PagedLARS, PagedLARS8bit, PagedLARS32bit
from q_optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from q_optim.manager import GlobalOptimManager
from q_optim.memory import state_bytes
from q_optim.muon import Muon, Muon8bit, PagedMuon, PagedMuon8bit
from q_optim.rmsprop import PagedRMSprop, PagedRMSprop8bit, PagedRMSprop32bit, RMSprop, RMSprop8bit, RMSprop32bit
from q_optim.sgd import SGD, PagedSGD, PagedSGD8bit, PagedSGD32bit, SGD8bit, SGD32bit

__version__ = "0.1.0"

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamW32bit",
    "GlobalOptimManager",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Muon",
    "Muon8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdagrad",
    "PagedAdagrad8bit",
    "PagedAdagrad32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLAMB",
    "PagedLAMB8bit",
    "PagedLAMB32bit",
    "PagedLARS",
    "PagedLARS8bit",
    "PagedLARS32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PagedMuon",
    "PagedMuon8bit",
    "PagedRMSprop",
    "PagedRMSprop8bit",
    "PagedRMSprop32bit",
    "PagedSGD",
    "PagedSGD8bit",
    "PagedSGD32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "StorageArguments",
    "state_bytes",
]
