"""Image regions from images: networks that find regions and compute their features, written as the table `regions`."""
