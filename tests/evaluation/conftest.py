"""Here so that pytest finds `small` and other helpers of this folder from the folders below it."""
