"""Which responses train: IFD, Delta-IFD and the proximal zone (METHOD section 3)."""
