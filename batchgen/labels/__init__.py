"""Labels of images (boxes, polygons, masks, keypoints): read, moved with the pixels, withdrawn."""
