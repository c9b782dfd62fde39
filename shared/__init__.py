"""What every detector needs: COCO data, evaluation, the trial and its launcher. Imports no detector library."""
