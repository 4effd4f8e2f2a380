"""The rooms of SC-EGG (docs/design.md)."""

from scegg.speed.threads import before_torch

before_torch()
