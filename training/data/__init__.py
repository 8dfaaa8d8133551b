"""Pictures of subjects: reading, masks, backgrounds, augmentation, latents."""

from __future__ import annotations
