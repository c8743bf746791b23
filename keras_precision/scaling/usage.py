"""Detects losses scaled twice or never, from the calls that a training loop makes."""

import weakref

import keras


class ScaleUsage:
    """Remembers, in Python, what was scaled and unscaled since the last update.

    Calls made while a program is compiled are seen once, however often the
    program runs. So once a loss was scaled inside one, forgetting is no longer
    detected; nor is scaling a tensor computed from a scaled loss.
    """

    def __init__(self):
        self._is_scaled = False
        self._was_staged = False
        self._outputs = []
        self._unscaled_in = None  # "eager" or "compiled" code

    def scaling(self, losses, is_staged: bool) -> None:
        """Notes that losses are about to be scaled.

        Raises:
            ValueError: one of them was scaled already.
        """
        known = [output() for output in self._outputs]
        if any(loss is output for loss in keras.tree.flatten(losses) for output in known if output is not None):
            raise ValueError(
                "Expected a loss that is not scaled yet. Received what scale_loss returned. Call scale_loss once; "
                "fit and train_on_batch call it themselves, unless compiled with auto_scale_loss=False."
            )
        self._is_scaled = True
        self._was_staged |= is_staged

    def scaled(self, losses) -> None:
        """Notes the scaled losses."""
        self._outputs += [weakref.ref(loss) for loss in keras.tree.flatten(losses)]

    def unscaling(self, is_staged: bool) -> None:
        """Notes that gradients of the coming update were unscaled by the caller."""
        self._unscaled_in = "compiled" if is_staged else "eager"

    def applying(self, is_staged: bool, unscaled: bool | None) -> bool:
        """Returns whether the gradients of an update are unscaled already, and forgets about it.

        Args:
            is_staged: whether the update is being compiled.
            unscaled: what the caller says; None to go by the calls made.

        Raises:
            ValueError: the loss was not scaled, or the calls don't tell.
        """
        was_scaled, unscaled_in = self._is_scaled, self._unscaled_in
        self._is_scaled, self._unscaled_in, self._outputs = False, None, []
        if unscaled is not None:
            return unscaled
        if not was_scaled and not self._was_staged:
            raise ValueError(
                "Expected gradients of a scaled loss. Received gradients, but scale_loss was not called since the "
                "last update. Differentiate optimizer.scale_loss(loss); or pass unscaled=True for gradients of the "
                "plain loss, unscaled=False for gradients that you scaled by hand."
            )
        here = "compiled" if is_staged else "eager"
        if unscaled_in not in (None, here):
            raise ValueError(
                f"Expected to unscale and to apply gradients in one place. Received gradients unscaled in {unscaled_in} "
                f"code and applied in {here} code, where later steps don't show it. Pass unscaled=True to apply."
            )
        return unscaled_in is not None
