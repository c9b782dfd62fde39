"""COCO truth of diamonds, and a detector's jittered masks of them."""

from collections.abc import Iterator

import numpy as np

HEIGHT, WIDTH, AN_IMAGE, CATEGORIES = 240, 320, 15, 20


def diamonds(images: int) -> tuple[dict, Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]]:
    """COCO's JSON structure, filled while the results are drawn: for each image its id, (N, 4) boxes as x1 y1 x2 y2,
    (N,) scores, (N,) labels and (N, height, width) masks."""
    coco = {"info": {}, "images": [], "annotations": []}
    coco["categories"] = [{"id": i + 1, "name": f"category {i + 1}"} for i in range(CATEGORIES)]

    def results() -> Iterator[tuple]:
        rng = np.random.default_rng(0)
        rows, columns = np.ogrid[:HEIGHT, :WIDTH]
        for image_id in range(1, images + 1):
            image = {"id": image_id, "file_name": f"{image_id}.jpg", "height": HEIGHT, "width": WIDTH}
            coco["images"].append(image)
            boxes, labels, masks = [], rng.integers(CATEGORIES, size=AN_IMAGE), []
            for label in labels.tolist():
                radius = rng.uniform(6, 60)
                x, y = rng.uniform(radius, WIDTH - radius), rng.uniform(radius, HEIGHT - radius)
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": image_id,
                        "category_id": label + 1,
                        "bbox": [x - radius, y - radius, 2 * radius, 2 * radius],
                        "area": 2 * radius**2,
                        "iscrowd": 0,
                        "segmentation": [[x - radius, y, x, y - radius, x + radius, y, x, y + radius]],
                    }
                )
                x, y = x + rng.normal(0, 3), y + rng.normal(0, 3)
                masks.append(abs(columns - x) + abs(rows - y) < radius)
                boxes.append([x - radius, y - radius, x + radius, y + radius])
            yield image_id, np.array(boxes, np.float32), rng.uniform(size=AN_IMAGE), labels, np.stack(masks)

    return coco, results()
