"""Files of volumes: finding, reading and writing them back, intensities and grids, the cache, synthetic ones.

Nobody copies a room of this folder alone; data.py is its front. The rooms, lowest first:

    files            text of messages, errors, names of files, files that are written whole or not at all
    seeds            a random generator for every (seed, purpose, number)
    config           DataConfig, and VoxelSettings: those of its fields that the cached voxels depend on
    volume           what a file holds (Volume, Source) and how it lay on disk (Origin); checks of its header
    format_nibabel, format_arrays, format_pictures
                     a format each: how it is read and how it is written back
    formats          the table of them; a new format is a row there
    intensities      stored values to [-1, 1] and back
    grids            other voxel sizes for images and labels
    results          what a network made of a file, back on the file's grid
    find             folders and datalists -> items, images with their labels
    load             a file through the whole pipeline
    entries          a volume that is ready to be cropped
    points           where its foreground lies
    cache            entries from the cache folder, or built there
    synthetic        entries made up from a seed

Arrays are (C, D, H, W): C channels, D H W depth height width. Sizes and spacing (mm) are D, H, W.
"""
