"""How good are these images? Figures beside the figure that real images reach at the same number of images.

Knows data sets and arrays of images; knows no family. `features.build` gives the space in which images are compared,
`report.judge` the figures, `report.render` their table.
"""
