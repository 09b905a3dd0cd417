"""Made-up clouds and their shadows over real ground: labelled examples of what nobody labelled."""

# C band, H row, W column

import numpy as np
from numpy.typing import NDArray

from geodeploy.bands import WAVELENGTH_UM
from geodeploy.labels import IGNORED
from geodeploy.train.recipe import Clouds, Recipe

_OPAQUE, _CLEAR = 0.2, 0.06
"""Cover from which a pixel is cloud, and up to which it is what it was; between them nobody can say."""
_DARK, _LIT = 0.15, 0.05
"""The same for the light that a shadow takes."""
_SWIR_UM = 1.3
"""Beyond this, water droplets and ice absorb."""
_PATH_AT_BLUE = 0.05
"""Reflectance of the air itself at 0.49 micrometres, which no shadow takes away."""


class CloudMaker:
    """Draws clouds over tiles. Values are reflectances."""

    def __init__(self, recipe: Recipe) -> None:
        self.settings: Clouds = recipe.augmentation.clouds
        positions = {item.value: number for number, item in enumerate(recipe.classes)}
        cloud, shadow = self.settings.cloud, self.settings.shadow
        self.cloud = IGNORED if cloud is None else positions[cloud]
        self.shadow = IGNORED if shadow is None else positions[shadow]
        self.unshaded = [positions[value] for value in self.settings.unshaded]
        # A recipe that asks for clouds has no band of unknown wavelength.
        wavelengths = [WAVELENGTH_UM.get(band, 0.6) for band in recipe.data.bands]
        self.swir = np.array(wavelengths) > _SWIR_UM
        # Rayleigh scattering falls with the fourth power of the wavelength, haze with less.
        self.path = np.array([_PATH_AT_BLUE * (0.49 / um) ** 3 for um in wavelengths], np.float32)

    def __call__(
        self,
        pixels_CHW: NDArray[np.float32],
        codes_HW: NDArray[np.uint8],
        rng: np.random.Generator,
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]:
        """Pixels and codes under the new clouds, and which pixels they changed for the eye to see.

        Ground that was cloud or shadow before stays what it was in a new shadow, and so does any ground
        if the model has no class for shadows. Ground of no known class gets the label of clouds alone.
        """
        side = codes_HW.shape[-1]
        cover = self._draw_cover(side, rng)
        taken = self._cast(cover, rng)
        path = self.path[:, np.newaxis, np.newaxis]
        shaded = path + (pixels_CHW - path) * (1 - taken)
        # What is darker than the air's own light is not made brighter.
        shaded = np.minimum(shaded, pixels_CHW)
        mixed = shaded * (1 - cover) + self._light(side, rng) * cover
        codes = codes_HW.copy()
        if self.shadow != IGNORED:
            ground = ~np.isin(codes_HW, [self.cloud, self.shadow, IGNORED])
            shadeable = ground & ~np.isin(codes_HW, self.unshaded)
            codes[ground & (taken > _LIT)] = IGNORED
            codes[shadeable & (taken > _DARK)] = self.shadow
        codes[(cover > _CLEAR) & (codes_HW != self.cloud)] = IGNORED
        codes[cover > _OPAQUE] = self.cloud
        changed = (cover > _CLEAR) | (taken > _LIT)
        return mixed.astype(np.float32), codes, changed

    def _draw_cover(self, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """How much of the light at each pixel is the cloud's: 0 to 1, (H, W)."""
        field = fractal(side, rng.uniform(1.4, 2.4), rng)
        share = rng.uniform(0.03, 0.5)
        edge = np.quantile(field, 1 - share)
        depth = np.clip((field - edge) / rng.uniform(0.1, 1.0), 0, 1)
        thickest = 1.0 if rng.random() < 0.6 else rng.uniform(0.35, 1.0)
        cover: NDArray[np.float32] = (depth ** rng.uniform(0.5, 1.2) * thickest).astype(np.float32)
        return cover

    def _cast(self, cover: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        """The share of the direct light that the cloud's shadow takes at each pixel."""
        side = len(cover)
        away, angle = rng.uniform(0.02, 0.35) * side, rng.uniform(0, 2 * np.pi)
        shift = (round(away * np.sin(angle)), round(away * np.cos(angle)))
        strength = rng.uniform(0.4, 0.85)
        return np.roll(cover, shift, axis=(0, 1)) * np.float32(strength)

    def _light(self, side: int, rng: np.random.Generator) -> NDArray[np.float32]:
        """The reflectance of the cloud itself, (C, H, W)."""
        brightness = rng.uniform(0.3, 0.95)
        spectrum = brightness * np.exp(rng.normal(0, 0.05, len(self.swir)))
        absorbed = rng.uniform(0.4, 1.0)
        spectrum[self.swir] *= absorbed * np.exp(rng.normal(0, 0.1, int(self.swir.sum())))
        texture = 1 + rng.uniform(0, 0.25) * fractal(side, 1.6, rng)
        lit = spectrum[:, np.newaxis, np.newaxis] * np.clip(texture, 0.5, 1.5)
        return lit.astype(np.float32)


def fractal(side: int, slope: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise (side, side), mean 0, deviation 1, whose amplitude falls with frequency ** ``slope``."""
    rows, cols = np.fft.fftfreq(side), np.fft.rfftfreq(side)
    frequency = np.hypot(rows[:, np.newaxis], cols)
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / frequency**slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, s=(side, side))
    scaled: NDArray[np.float64] = field / field.std()
    return scaled
