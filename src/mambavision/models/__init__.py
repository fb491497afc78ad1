"""The network: `backbone` makes feature maps, `classifier` adds the norm and the head."""
