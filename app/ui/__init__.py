"""The tabs of the page, one file each; a tab is a layout and its bindings to services."""
