"""Which answers train: IFD, Delta-IFD and the proximal zone (METHOD section 3)."""
