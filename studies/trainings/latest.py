# Licensed under the Apache License, Version 2.0.
"""Parts of a Faster R-CNN in which the images of earlier steps take part in statistics alone.

Each step's batch ends with the new images; its losses are those of the last image.
"""

from collections import deque
from collections.abc import Iterator

from mmdet.models import RPNHead, StandardRoIHead
from mmdet.registry import DATA_SAMPLERS, MODELS
from mmdet.structures.bbox import bbox2roi
from torch.utils.data import BatchSampler

LAST = slice(-1, None)


@DATA_SAMPLERS.register_module()
class LatestBatchSampler(BatchSampler):
    """Yields batches that end with the sampler's next images, after those of earlier steps."""

    def __init__(self, *args, together: int, drop_last: bool = False, **kwargs) -> None:
        super().__init__(*args, drop_last=drop_last, **kwargs)
        self.together = together  # steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each step's images."""
        latest = deque(maxlen=self.together)
        for batch in super().__iter__():
            latest.append(batch)
            yield sum(latest, [])


@MODELS.register_module()
class LatestRPNHead(RPNHead):
    """Proposes in all images, and learns from the last."""

    def loss_by_feat(self, cls_scores, bbox_preds, gt, metas, batch_gt_instances_ignore=None):
        """Compute the losses of the last image."""
        ignored = batch_gt_instances_ignore and batch_gt_instances_ignore[LAST]
        maps = ([each[LAST] for each in of_levels] for of_levels in (cls_scores, bbox_preds))
        return super().loss_by_feat(*maps, gt[LAST], metas[LAST], ignored)


@MODELS.register_module()
class LatestRoIHead(StandardRoIHead):
    """Runs its box head on regions of all images, and learns from the last."""

    def bbox_loss(self, x, sampling_results):
        """Compute the losses of the last image's regions."""
        regions = bbox2roi([each.priors for each in sampling_results])
        results, (last,) = self._bbox_forward(x, regions), sampling_results[LAST]
        rows = slice(len(regions) - len(last.priors), None)
        found = self.bbox_head.loss_and_target(
            results["cls_score"][rows],
            results["bbox_pred"][rows],
            regions[rows],
            [last],
            self.train_cfg,
        )
        return {**results, "loss_bbox": found["loss_bbox"]}
